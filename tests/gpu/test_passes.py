"""No pass of Triton's compiler from TTIR to TTGIR changes what a kernel computes."""

import pytest
import torch
from oracle import problem

from gpu.support import USES, cotangents, gradients, outputs

# More rows than a tile has, columns over two tiles, queries over two.
SHAPE = (1, 2, 34, 36, 40)
JUDGED: dict[str, object] = {}  # one launch of every kernel that was, by its TTIR
CALLS = [
    *((operation, {}) for operation in USES if operation != "solve_addressing"),  # a read
    ("write", {"num_opt_iters": 2, "method": "deepmind"}),
    ("update_posterior", {"precision": "tf32x3"}),
    ("read", {"precision": "tf32", "num_iters": 3}),
]


@pytest.fixture
def passes(request, kernels):
    if request.config.getoption("--kernels") != "ttsem":
        pytest.skip("needs --kernels=ttsem")
    from gpu import passes

    return passes


@pytest.fixture
def recorded(passes, monkeypatch):
    """One launch of every kernel that a test makes."""
    recorder = passes.Recorder()
    monkeypatch.setattr(passes.harness, "execute", recorder)
    return recorder.launches


@pytest.mark.parametrize(("operation", "options"), CALLS, ids=str)
def test_no_pass_changes_what_a_kernel_computes(kernels, passes, recorded, operation, options):
    p = problem(*SHAPE, torch.float32)
    given = cotangents(outputs(operation, p, "reference", **options))
    gradients(kernels, operation, p, kernels.backend, given, **options)
    new = {kernel: launch for kernel, launch in recorded.items() if kernel not in JUDGED}
    verdicts = [verdict for launch in new.values() for verdict in passes.judge(launch)]
    JUDGED.update(new)
    assert verdicts
    # What stands for one product in tf32x3 is three in TTGIR.
    allowed = ("match", "approx") if options.get("precision") == "tf32x3" else ("match",)
    assert not [verdict for verdict in verdicts if verdict.outcome not in allowed]


def test_a_pass_that_changes_the_result_is_named(passes, recorded):
    from gpu.planted import double

    double[(2,)](torch.randn(20), torch.empty(20), 20, MASKED=True, BLOCK=16)
    (record,) = recorded.values()
    stages = passes.every_stage(record, "sm_90")
    assert len(stages) > 5
    assert {stage.verdict for stage in passes.validate.validate_stages(record, stages).passes} == {"match"}
    middle = len(stages) // 2
    wrong = [(name, text.replace("arith.mulf", "arith.addf")) for name, text in stages[middle:]]
    assert wrong != stages[middle:]
    assert passes.validate.validate_stages(record, stages[:middle] + wrong).changed_by == stages[middle - 1][0]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("arith.subf", "arith.addf"), ("arith.muli", "arith.addi"), ("predicate = 4", "predicate = 5")],
    ids=["a sum for a difference", "another address", "another comparison"],
)
def test_a_changed_kernel_is_caught(kernels, passes, recorded, monkeypatch, right, wrong):
    kernels.call("logdet", problem(2, 1, 1, 36, 1, torch.float32))
    (record,) = recorded.values()
    print_stage = passes.harness._stage_text

    def changed(*arguments):
        text = print_stage(*arguments)
        assert right in text
        return text.replace(right, wrong)

    assert {verdict.outcome for verdict in passes.judge(record)} == {"match"}
    monkeypatch.setattr(passes.harness, "_stage_text", changed)
    assert "match" not in {verdict.outcome for verdict in passes.judge(record)}
