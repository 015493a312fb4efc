"""Which backend a call takes: the table, the words, and no silent fallback."""

import oracle
import pytest
import torch
from oracle import call, problem, runs_on_cpu
from planted import KERNELS, replace_kernel
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkm
from fastkm import BackendUnavailableError
from fastkm._runtime import dispatch, schema
from fastkm._runtime.dispatch import CAPABILITIES, PREFERENCE, explain_backend, resolve, why_not

NATIVE_OPERATIONS = [operation for operation in CAPABILITIES if runs_on_cpu(operation, "native")]
IN_PLACE = ("update_posterior_into", "write_into", "stream")  # they change a memory and have no gradient
DIFFERENTIABLE = [operation for operation in NATIVE_OPERATIONS if operation not in IN_PLACE]
CALLABLE = [operation for operation in CAPABILITIES if operation in oracle.OPERATIONS]
PLAIN = [o for o in NATIVE_OPERATIONS if o in CALLABLE and o in KERNELS]  # an attractor read calls other operators
NATIVE_MISSING = pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(schema, "unavailable", "the C++ extension was not built")


@pytest.fixture
def extension(monkeypatch):
    """The table as it reads with the extension; nothing is run."""
    monkeypatch.setattr(schema, "unavailable", None)


def test_every_operation_has_a_reference_for_any_device_and_gradients():
    for operation, table in CAPABILITIES.items():
        assert set(table) <= set(PREFERENCE), operation
        assert table["reference"] == dispatch.Capability(devices={}, gradients=operation not in IN_PLACE), operation


@pytest.mark.parametrize("operation", CAPABILITIES)
def test_without_the_extension_the_reference_is_taken(operation, no_extension):
    assert resolve(operation, None, torch.ones(1)) == "reference"
    assert resolve(operation, "reference", torch.ones(1)) == "reference"


@pytest.mark.parametrize("operation", NATIVE_OPERATIONS)
def test_with_the_extension_native_is_taken(operation, extension):
    assert resolve(operation, None, torch.ones(1)) == "native"
    assert resolve(operation, "reference", torch.ones(1)) == "reference"


@pytest.mark.parametrize("operation", NATIVE_OPERATIONS)
def test_native_is_not_taken_elsewhere_than_it_has_kernels_for(operation, extension):
    with FakeTensorMode():
        elsewhere = torch.ones(1, device="xpu")
    assert resolve(operation, None, elsewhere) == "reference"
    where = ", ".join(CAPABILITIES[operation]["native"].devices)
    with pytest.raises(
        BackendUnavailableError, match=rf"runs on {where}, the tensors are on xpu; take backend='reference'"
    ):
        resolve(operation, "native", elsewhere)


@pytest.mark.parametrize("operation", NATIVE_OPERATIONS)
def test_meta_tensors_take_the_backend_that_their_values_would(operation, extension):
    for dtype in dispatch.DTYPES:
        nothing = torch.ones(1, device="meta", dtype=dtype)
        assert (resolve(operation, None, nothing), resolve(operation, "native", nothing)) == ("native", "native")


@pytest.mark.parametrize("operation", NATIVE_OPERATIONS)
def test_native_is_not_taken_in_a_dtype_it_does_not_compute_in(operation, extension, monkeypatch):
    """As the kernels for GPUs, which compute in float32 only."""
    monkeypatch.setitem(CAPABILITIES[operation], "native", dispatch.Capability({"cpu": dispatch.FLOAT32}))
    narrow, wide = torch.ones(1), torch.ones(1, dtype=torch.float64)
    assert (resolve(operation, None, narrow), resolve(operation, None, wide)) == ("native", "reference")
    with pytest.raises(
        BackendUnavailableError,
        match=r"on cpu it computes in float32, the memory is float64; take backend='reference'",
    ):
        resolve(operation, "native", wide)


@pytest.mark.parametrize("operation", CAPABILITIES)
def test_named_backend_that_cannot_run_raises_with_reason_and_remedy(operation, no_extension):
    for backend in ("native", "triton"):
        with pytest.raises(BackendUnavailableError, match=f"^backend '{backend}' cannot run {operation}: ") as caught:
            resolve(operation, backend, torch.ones(1))
        assert "reference" in str(caught.value), "the remedy"
        if backend == "native" and operation in NATIVE_OPERATIONS:
            assert "was not built" in str(caught.value)
            assert "C++ compiler" in str(caught.value)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("operation", CALLABLE)
def test_public_functions_do_not_fall_back(operation, backend, no_extension):
    with pytest.raises(BackendUnavailableError, match=f"cannot run {operation}"):
        call(operation, problem(2, 3, 3, 4, 5), backend)


@NATIVE_MISSING
@pytest.mark.parametrize("operation", PLAIN)
def test_public_functions_run_what_they_were_told(operation, monkeypatch):
    """The native operator runs for native and for None, and never for the reference."""
    ran = []
    for name in KERNELS[operation].kernels:
        replace_kernel(monkeypatch, operation, name, lambda run, name=name: lambda *a: ran.append(name) or run(*a))
    for backend in ("native", None, "reference"):
        call(operation, problem(2, 3, 3, 4, 5), backend)
    assert ran == ["native", "native", "reference"]


@NATIVE_MISSING
@pytest.mark.parametrize("operation", PLAIN)
def test_a_plain_call_that_wants_a_gradient_passes_no_guard(operation, monkeypatch):
    """Nothing of what the guards would run is run, and the operator is, once."""
    ran, p = [], with_gradient(problem(2, 3, 3, 4, 5))
    declared = KERNELS[operation]
    run = declared.native.operator
    monkeypatch.setattr(declared.native, "operator", lambda *a: ran.append("operator") or run(*a))
    monkeypatch.setitem(declared.kernels, "native", lambda *a: ran.append("guarded"))
    results = oracle.flat(call(operation, p, None)).values()
    assert any(x.requires_grad for x in results)
    assert ran == ["operator"]


@NATIVE_MISSING
def test_a_plain_call_under_another_chosen_backend_is_not_native(monkeypatch):
    ran = []
    replace_kernel(monkeypatch, "read", "native", lambda run: lambda *a: ran.append("native") or run(*a))
    monkeypatch.setattr(dispatch, "CHOSEN", "reference")
    call("read", problem(2, 3, 3, 4, 5), None)
    assert not ran
    call("read", problem(2, 3, 3, 4, 5), "native")
    assert ran == ["native"]


# --------------------------------------------------------------------------------------------------------- gradients


@pytest.fixture
def forward_only(monkeypatch, extension):
    """The table as it reads for a native backend without gradients."""
    for operation in NATIVE_OPERATIONS:
        without = CAPABILITIES[operation]["native"]._replace(gradients=False)
        monkeypatch.setitem(CAPABILITIES[operation], "native", without)


def with_gradient(p):
    return p._replace(state=p.state._replace(mean=p.state.mean.clone().requires_grad_()))


@pytest.mark.parametrize("operation", DIFFERENTIABLE)
def test_native_has_gradients(operation, extension):
    wanted = torch.ones(1, requires_grad=True)
    assert resolve(operation, None, wanted) == resolve(operation, "native", wanted) == "native"


@pytest.mark.parametrize("operation", DIFFERENTIABLE)
def test_a_backend_without_gradients_says_so(operation, forward_only):
    wanted = torch.ones(1, requires_grad=True)
    assert resolve(operation, None, wanted) == "reference"
    with pytest.raises(BackendUnavailableError, match=r"no gradient.*backend='reference'.*no_grad"):
        resolve(operation, "native", wanted)
    with torch.no_grad():
        assert resolve(operation, "native", wanted) == resolve(operation, None, wanted) == "native"


@NATIVE_MISSING
@pytest.mark.parametrize("operation", [o for o in NATIVE_OPERATIONS if o in CALLABLE and o != "factor_addressing"])
def test_calls_that_want_a_gradient_a_backend_lacks_take_the_reference_or_raise(operation, forward_only):
    p = with_gradient(problem(2, 3, 3, 4, 5))
    with pytest.raises(BackendUnavailableError, match=r"no gradient.*backend='reference'"):
        call(operation, p, "native")
    results = oracle.flat(call(operation, p, None)).values()
    sum(x.sum() for x in results if x.requires_grad).backward()
    assert p.state.mean.grad.isfinite().all()
    assert p.state.mean.grad.abs().max() > 0
    with torch.no_grad():
        assert not any(x.requires_grad for x in oracle.flat(call(operation, p, "native")).values())


@pytest.mark.parametrize(
    "operation",
    ["solve_addressing", "solve_factored", "update_posterior", "write", "read", "read_factored", "attractor_read"],
)
def test_gradients_of_the_reference(operation):
    """Against finite differences, for every argument at once."""
    p = problem(1, 2, 2, 3, 4, masked=False)
    leaves = [x.clone().requires_grad_() for x in oracle.tensors(p)]

    def outputs(mean, cov, *rest):
        symmetric = fastkm.MemoryState(mean, (cov + cov.mT) / 2)
        result = call(operation, oracle.Problem(symmetric, *rest, None), "reference")
        return tuple(x for x in oracle.flat(result).values() if x.requires_grad)

    assert torch.autograd.gradcheck(outputs, leaves)


# ----------------------------------------------------------------------------------------------------- FASTKM_BACKEND


def test_variable_names_the_backend_of_calls_that_name_none(monkeypatch, extension):
    monkeypatch.setattr(dispatch, "CHOSEN", "reference")
    assert resolve("write", None, torch.ones(1)) == "reference"
    assert resolve("write", "native", torch.ones(1)) == "native"
    monkeypatch.setattr(dispatch, "CHOSEN", "native")
    assert resolve("write", None, torch.ones(1)) == "native"


def test_variable_does_not_fall_back_either(monkeypatch, no_extension):
    monkeypatch.setattr(dispatch, "CHOSEN", "native")
    with pytest.raises(BackendUnavailableError, match="backend 'native' cannot run write"):
        resolve("write", None, torch.ones(1))
    monkeypatch.setattr(dispatch, "CHOSEN", "cuda")
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'cuda'"):
        resolve("write", None, torch.ones(1))


# ---------------------------------------------------------------------------------------------------- explain_backend


def test_explanation_with_the_extension(capsys, extension):
    explain_backend("write", torch.ones(1))
    taken, native, triton, reference = capsys.readouterr().out.splitlines()
    assert taken == "write: native"
    assert native.split() == ["native", "taken"]
    assert triton.split(maxsplit=1) == ["triton", f"no: {why_not('write', 'triton')}"]
    assert reference.split(maxsplit=1) == ["reference", "can run"]


def test_explanation_without_the_extension(capsys, no_extension):
    explain_backend("read")
    taken, native, _, reference = capsys.readouterr().out.splitlines()
    assert taken == "read: reference"
    assert "no: the C++ extension was not built; install a C++ compiler" in native
    assert reference.split() == ["reference", "taken"]


def test_explanation_of_a_call_that_wants_a_gradient(capsys, forward_only):
    explain_backend("write", torch.ones(1, requires_grad=True))
    out = capsys.readouterr().out
    assert out.startswith("write: reference\n")
    assert "no gradient for write yet" in out


@pytest.mark.parametrize("operation", CALLABLE)
def test_explanation_is_what_happens(operation, capsys, no_extension):
    """The first line names the backend that resolve takes, for every operation of the table."""
    explain_backend(operation, backend="reference")
    assert capsys.readouterr().out.startswith(f"{operation}: reference\n")
    with pytest.raises(BackendUnavailableError):
        explain_backend(operation, backend="native")


def test_explanation_of_an_unknown_operation():
    with pytest.raises(ValueError, match=r"operation must be one of 'solve_addressing', .*got 'wrote'"):
        explain_backend("wrote")


# ------------------------------------------------------------------------------------------ few large memories on a GPU


WITH_GPU_KERNELS = [name for name, table in CAPABILITIES.items() if "triton" in table]


@pytest.fixture
def gpu(extension, monkeypatch):
    """Tensors on a GPU that hold nothing, and the table as it reads where both sets of GPU kernels are built."""
    monkeypatch.setattr(schema, "has_cuda", True)
    monkeypatch.setattr(dispatch, "has_triton", True)
    monkeypatch.setattr(dispatch, "CHOSEN", None)

    def tensors(*shapes):
        with FakeTensorMode():
            return [torch.ones(*shape, device="cuda") for shape in shapes]

    return tensors


def taken(operation, tensors):
    return resolve(operation, None, *tensors)


def state_shapes(B, K, C=512):
    return (B, K, C), (B, K, K)


@pytest.mark.parametrize("operation", WITH_GPU_KERNELS)
def test_few_large_memories_on_a_gpu_go_to_the_block_form(operation, gpu):
    kernel = "native" if "cuda" in CAPABILITIES[operation]["native"].devices else "triton"
    for B, K, backend in (
        (1, 1024, "reference"),
        (4, 1024, "reference"),
        (5, 1024, kernel),  # 256 · 5 > 1024
        (1, 1023, kernel),
        (16, 4096, "reference"),
        (17, 4096, kernel),
    ):
        tensors = gpu(*state_shapes(B, K), (B, 1, 512))
        assert taken(operation, tensors) == backend, (B, K)
        assert resolve(operation, kernel, *tensors) == kernel
        assert resolve(operation, "triton", *tensors) == "triton"


def test_a_filter_on_a_gpu_is_that_of_cuda(gpu):
    tensors = gpu(*state_shapes(4, 64, 64), (4, 32, 64))
    assert taken("filter_posterior", tensors) == "native"
    assert resolve("filter_posterior", "triton", *tensors) == "triton"


def test_every_pattern_of_a_write_is_a_factorisation(gpu):
    for T, backend in ((4, "reference"), (5, "native")):
        tensors = gpu(*state_shapes(1, 1024), (1, T, 512))
        assert taken("write", tensors) == backend
        assert taken("update_posterior", tensors) == "reference"  # a block of patterns is one elimination


def test_the_rule_is_for_gpus_and_for_calls_that_name_no_backend(gpu, monkeypatch):
    large = state_shapes(1, 4096, 8)
    with FakeTensorMode():
        on_cpu = [torch.ones(*shape) for shape in large]
    assert taken("write", on_cpu) == "native"
    monkeypatch.setattr(dispatch, "CHOSEN", "triton")
    assert taken("write", gpu(*large)) == "triton"


def test_the_explanation_has_no_rule_where_no_kernel_could_run(gpu, capsys):
    with FakeTensorMode():
        double = torch.ones(1, 4096, 8, device="cuda", dtype=torch.float64)
    explain_backend("read", double)
    assert capsys.readouterr().out.splitlines()[-1].split() == ["reference", "taken"]


@pytest.mark.parametrize("shapes", [(), ((4096, 8),), ((1, 4096),)])
def test_the_rule_needs_the_shape_of_a_memory(shapes, gpu):
    assert not dispatch.leaves_gpu_empty("write", *gpu(*shapes))


def test_the_explanation_names_the_block_form(gpu, capsys):
    tensors = gpu(*state_shapes(1, 4096), (1, 16, 512))
    explain_backend("write", *tensors)
    first, native, triton, reference = capsys.readouterr().out.splitlines()
    assert first == "write: reference"
    assert native.split(maxsplit=1)[1].startswith("can run, but so few memories of this size leave the GPU empty")
    assert triton.split(maxsplit=1)[1].startswith("can run, but")
    assert reference.split(maxsplit=1)[1].startswith("taken: the block form in PyTorch's own operations")
    explain_backend("write", *tensors, backend="native")
    first, native, _, reference = capsys.readouterr().out.splitlines()
    assert (first, native.split()[1:], reference.split()[1:]) == ("write: native", ["taken"], ["can", "run"])


@pytest.mark.parametrize(("backend", "who"), [(None, "reference"), ("native", "native"), ("triton", "triton")])
def test_a_call_of_a_large_memory_on_a_gpu_runs_what_the_rule_says(backend, who, gpu, monkeypatch):
    class Ran(Exception):
        """Ends the call, whose outputs would hold nothing."""

    def stop(name):
        def kernel(*inputs):
            raise Ran(name)

        return kernel

    for name in PREFERENCE:
        monkeypatch.setitem(KERNELS["update_posterior"].kernels, name, stop(name))
    with FakeTensorMode():
        shapes = (1, 1024, 4), (1, 1024, 1024), (1, 2, 1024), (1, 2, 4), (1, 2)
        mean, cov, weights, values, noise_var = (torch.ones(*shape, device="cuda") for shape in shapes)
        with pytest.raises(Ran, match=who):
            fastkm.update_posterior(fastkm.MemoryState(mean, cov), weights, values, noise_var, backend=backend)
