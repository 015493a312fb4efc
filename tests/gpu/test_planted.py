"""A checker that has never caught anything proves nothing: each rung catches the mistakes it is there for."""

import pytest
import torch


@pytest.fixture
def planted(request, kernels):
    if request.config.getoption("--kernels") not in ("interpreter", "ttsem"):
        pytest.skip("a device does not report these mistakes")
    from gpu import planted

    return planted


@pytest.fixture
def fault(request, planted):
    """The exception of a rung for an access outside every tensor."""
    if request.config.getoption("--kernels") == "ttsem":
        from ttsem.sanitize import KernelFault

        return KernelFault
    from triton.runtime.errors import InterpreterError

    return InterpreterError


def test_a_store_that_lacks_its_mask(planted, fault):
    x, out = torch.randn(20), torch.empty(20)
    planted.double[(2,)](x, out, 20, MASKED=True, BLOCK=16)
    assert torch.equal(out, 2 * x)
    with pytest.raises(fault):
        planted.double[(2,)](x, out, 20, MASKED=False, BLOCK=16)


def test_a_load_before_the_first_entry(planted, fault):
    with pytest.raises(fault):
        planted.shift[(1,)](torch.randn(16), torch.empty(16), 16, BLOCK=16)


def test_a_masked_load_that_lacks_its_other(request, planted):
    if request.config.getoption("--kernels") == "ttsem":
        pytest.skip("ttsem takes zero for what is masked")
    out = torch.zeros(1)
    planted.total[(1,)](torch.ones(20), out, 20, BLOCK=32)
    assert out.isnan()


def test_programs_that_write_one_entry(request, planted, fault):
    if request.config.getoption("--kernels") == "ttsem":
        with pytest.raises(fault, match="both touch element 0"):
            planted.last_writer[(8,)](torch.empty(1))
        return
    written = []
    for _ in range(8):  # in a shuffled order each
        written.append(torch.empty(1))
        planted.last_writer[(8,)](written[-1])
    assert len({x.item() for x in written}) > 1


@pytest.mark.parametrize(
    "mistake", [{"SEM": "relaxed"}, {"SEM": "acquire"}, {"GUARDED": False}, {"EARLY": True}, {}], ids=str
)
def test_a_ticket_that_does_not_order(request, planted, fault, mistake):
    """A draw that does not acquire and release; parts read before all are stored; a part stored after the draw."""
    if request.config.getoption("--kernels") != "ttsem":
        pytest.skip("programs of the interpreter run one after the other")
    ticket, out, chosen = torch.zeros(1, dtype=torch.int32), torch.empty(1), {"SEM": "acq_rel", "GUARDED": True}

    def launch():
        planted.sum_by_the_last[(4,)](
            torch.ones(4), torch.zeros(4), ticket, out, 4, **({"EARLY": False} | chosen | mistake)
        )

    if mistake:
        with pytest.raises(fault, match="both touch element"):
            launch()
    else:
        launch()
        assert out == 8


def test_a_product_of_no_stated_precision(planted):
    a, b = torch.randn(32, 32), torch.randn(32, 32)
    stated, default = torch.empty(32, 32), torch.empty(32, 32)
    planted.multiply[(1,)](a, b, stated, STATED=True, N=32)
    planted.multiply[(1,)](a, b, default, STATED=False, N=32)
    truth = a.double() @ b.double()
    assert (stated - truth).abs().max() < 1e-5
    assert (default - truth).abs().max() > 1e-3


def test_bfloat16_rounds_to_nearest(planted):
    a, b = (torch.randn(64).bfloat16() for _ in range(2))
    out = torch.empty(64, dtype=torch.bfloat16)
    planted.add_in_bfloat16[(1,)](a, b, out, N=64)
    assert torch.equal(out, (a.float() + b.float()).bfloat16())
