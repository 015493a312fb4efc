"""The one way into a kernel: what is computed, how often, and which error surfaces."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import call, flat, problem
from planted import KERNELS

import fastkm
from fastkm import MemoryState
from fastkm._runtime import dispatch, schema
from fastkm.matrix_normal.api import KL_MEMORY_DEEPMIND
from fastkm.posterior.api import UPDATE_POSTERIOR_INTO
from fastkm.reading.api import ATTRACTOR_READ
from fastkm.writing.api import WRITE_INTO

PACKAGE = Path(fastkm.__file__).parent
# Not fastkm.testing: whatever a backend under test raises is its verdict.
LIBRARY = [path for path in PACKAGE.rglob("*.py") if not {"testing", "cli"} & set(path.relative_to(PACKAGE).parts)]
NATIVE_MISSING = pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
CALLABLE = [operation for operation in KERNELS if operation != "logdet"]
FACTORED = ("factor_addressing", "solve_factored", "read_factored")


def computed_for(operation, computed):
    """Without the factor that an operation was called with."""
    return [name for name in computed if operation == "factor_addressing" or name != "factor_addressing"]


def run(operation, p, backend=None):
    return fastkm.logdet(p.state.cov, backend=backend) if operation == "logdet" else call(operation, p, backend)


def with_gradient(p):
    mean, cov = (x.clone().requires_grad_() for x in p.state)
    return p._replace(state=MemoryState(mean, cov))


@pytest.fixture(params=[False, True], ids=["plain", "gradient"])
def given(request):
    p = problem(2, 3, 3, 4, 5, torch.float32)
    return with_gradient(p) if request.param else p


@pytest.fixture
def computed(monkeypatch):
    """Names of the operations and backends that were computed, in order."""
    ran = []

    def recorded(name, compute):
        return lambda *inputs: ran.append(name) or compute(*inputs)

    for operation in KERNELS.values():
        for backend, kernel in operation.kernels.items():
            monkeypatch.setitem(operation.kernels, backend, recorded(f"{operation.name} checked {backend}", kernel))
        operator = operation.native.operator
        monkeypatch.setattr(operation.native, "operator", recorded(operation.name, operator))
    return ran


# -------------------------------------------------------------------------------------------------------------- errors


@NATIVE_MISSING
@pytest.mark.parametrize("backend", [None, "native"])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("out of memory"),
        NotImplementedError("no kernel"),
        MemoryError("no memory"),
        AttributeError("a bug"),
        TypeError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("operation", KERNELS)
def test_an_error_of_the_operator_surfaces_unchanged(operation, error, backend, given, computed, monkeypatch):
    """Nothing else computes the call, and the error is the operator's own."""

    def fail(*_):
        raise error

    monkeypatch.setattr(KERNELS[operation].native, "operator", fail)
    with pytest.raises(type(error)) as caught:
        run(operation, given, backend)
    assert caught.value is error
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert not computed_for(operation, computed)


@NATIVE_MISSING
@pytest.mark.parametrize(
    "operation", ["update_posterior", "remove_patterns", "filter_posterior", "write", "kl_memory", "logdet"]
)
def test_a_bad_status_is_computed_once(operation, given, computed):
    cov = given.state.cov.detach().clone()
    cov[1] = -cov[1]
    p = given._replace(state=MemoryState(given.state.mean, cov.requires_grad_(given.state.cov.requires_grad)))
    with pytest.raises(torch.linalg.LinAlgError, match=r"cov.* is not positive definite in memory \[1\]$"):
        run(operation, p)
    assert computed == [operation]


@NATIVE_MISSING
@pytest.mark.parametrize("operation", ["read", "solve_addressing"])
def test_a_memory_that_is_not_a_number_is_computed_once(operation, given, computed):
    mean = given.state.mean.detach().clone()
    mean[0, 0, 0] = torch.nan
    p = given._replace(state=given.state._replace(mean=mean.requires_grad_(given.state.mean.requires_grad)))
    with pytest.raises(torch.linalg.LinAlgError, match=r"^mean is not finite in memory \[0\]$"):
        run(operation, p)
    assert computed == [operation]


@NATIVE_MISSING
@pytest.mark.parametrize("operation", [operation for operation in CALLABLE if operation not in FACTORED])
def test_a_refusal_of_the_operator_ends_in_words(operation, given, computed):
    """The operator is asked once and refuses; the error in words is all that the caller sees."""
    mean, cov = given.state
    p = given._replace(state=MemoryState(mean.detach()[..., :-1], cov[:, :-1, :-1]))
    with pytest.raises(ValueError, match="must have shape") as caught:
        run(operation, p)
    assert caught.value.__suppress_context__
    assert computed == [operation]
    computed.clear()
    if operation != "kl_memory":
        variance = "ridge" if operation in ("read", "solve_addressing") else "noise_var"
        with pytest.raises(ValueError, match=f"{variance} must be positive and finite"):
            run(operation, given._replace(**{variance: -getattr(given, variance)}))
        assert computed == [operation]


@NATIVE_MISSING
@pytest.mark.parametrize("beyond", [2**63, 2**70])
def test_a_count_beyond_64_bits_is_refused_in_words(beyond, computed):
    p = problem(2, 3, 3, 4, 5, torch.float32)
    with pytest.raises(ValueError, match=r"^num_iters must be less than 2\^63, got"):
        fastkm.read(p.state.mean, p.queries, 1.0, num_iters=beyond)
    assert computed == ["read"]


def test_nothing_in_the_library_catches_every_exception():
    for path in LIBRARY:
        assert not re.search(r"except(\s+(Base)?Exception\b.*)?:", path.read_text()), path


# --------------------------------------------------------------------------------------------- what makes a call plain


@NATIVE_MISSING
@pytest.mark.parametrize("operation", KERNELS)
def test_a_plain_call_is_computed_once_by_the_operator(operation, given, computed):
    run(operation, given)
    assert computed_for(operation, computed) == [operation]


@NATIVE_MISSING
@pytest.mark.parametrize(
    ("change", "checked"),
    [
        ({"ridge": 2}, True),
        ({"ridge": 2.0}, False),
        ({"ridge": torch.tensor(2.0)}, False),
        ({"ridge": torch.nn.Parameter(torch.tensor(2.0), requires_grad=False)}, False),
        ({"ridge": np.float64(2.0)}, True),
        ({"ridge": np.float32(2.0)}, True),
        ({"ridge": np.float16(2.0)}, True),
        ({"ridge": np.int64(2)}, True),
        ({"ridge": np.array(2.0)}, True),
        ({"ridge": 2.0, "num_iters": np.int64(1)}, True),
        ({"ridge": 2.0, "num_iters": np.array(1)}, True),
    ],
    ids=str,
)
def test_every_way_to_give_a_number_gives_the_same(change, checked, computed):
    p = problem(2, 3, 3, 4, 5, torch.float32)
    expected = fastkm.read(p.state.mean, p.queries, torch.full((2,), 2.0))
    computed.clear()
    got = fastkm.read(p.state.mean, p.queries, **change)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert computed == ["read checked native" if checked else "read"]


@NATIVE_MISSING
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ridge": np.bool_(True)}, "ridge must be a float or a tensor, got bool"),
        ({"ridge": np.array([2.0])}, "ridge must be a float or a tensor, got ndarray"),
        ({"ridge": np.complex64(2)}, "ridge must be a float or a tensor, got complex64"),
        ({"num_iters": np.bool_(True)}, "num_iters must be an int, got bool"),
        ({"num_iters": np.float32(1)}, "num_iters must be an int, got float32"),
        ({"num_iters": np.array([1])}, "num_iters must be an int, got ndarray"),
    ],
    ids=str,
)
def test_what_is_no_number_is_refused(change, words):
    p = problem(2, 3, 3, 4, 5, torch.float32)
    with pytest.raises(TypeError, match=words):
        fastkm.read(p.state.mean, p.queries, **{"ridge": 1.0, **change})


@NATIVE_MISSING
def test_a_state_may_be_any_pair(computed):
    p = problem(2, 3, 3, 4, 5, torch.float32)
    expected = flat(fastkm.write(p.state, p.values, p.noise_var, p.ridge))
    got = flat(fastkm.write(tuple(p.state), p.values, p.noise_var, p.ridge))
    assert all(torch.equal(x, expected[name]) for name, x in got.items())
    parameters = MemoryState(*map(torch.nn.Parameter, p.state))
    got = flat(fastkm.write(parameters, p.values, p.noise_var, p.ridge))
    assert all(torch.equal(x, expected[name]) for name, x in got.items())
    assert got["state.mean" if "state.mean" in got else "mean"].requires_grad
    assert computed == ["write", "write checked native", "write"]


@NATIVE_MISSING
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_codes_of_low_precision_are_widened_and_computed_once(low, computed):
    p = problem(2, 3, 3, 4, 5, torch.float32)
    values = p.values.to(low)
    got = fastkm.write(p.state, values, 1.0, 1.0)
    assert computed == ["write checked native"]
    assert torch.equal(got.kl, fastkm.write(p.state, values.float(), 1.0, 1.0).kl)


@NATIVE_MISSING
def test_a_number_first_given_in_inference_mode_can_be_saved_for_backward():
    """Numbers are kept as tensors from call to call; a tensor made in inference mode cannot be saved."""
    p = problem(2, 3, 3, 4, 5, torch.float32)
    mean, number = p.state.mean.clone().requires_grad_(), 0.7310585786300049
    with torch.inference_mode():
        fastkm.read(mean, p.queries, number)
    fastkm.read(mean, p.queries, number).values.sum().backward()
    assert mean.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------ one declaration


def test_every_operation_of_the_table_is_declared_once_with_the_same_backends():
    declared = [*KERNELS.values(), UPDATE_POSTERIOR_INTO, WRITE_INTO, ATTRACTOR_READ, KL_MEMORY_DEEPMIND]
    assert sorted(operation.name for operation in declared) == sorted(dispatch.CAPABILITIES.keys() - {"stream"})
    for operation in declared:
        assert operation.kernels.keys() == dispatch.CAPABILITIES[operation.name].keys(), operation.name


@pytest.mark.parametrize(
    "operation", [*KERNELS.values(), UPDATE_POSTERIOR_INTO, WRITE_INTO], ids=lambda operation: operation.name
)
def test_the_checks_make_what_the_operator_takes(operation):
    """Positions and kinds of the inputs, against the schema."""
    kinds = {int: "int", bool: "bool"}
    arguments = getattr(torch.ops.fastkm, operation.name).default._schema.arguments
    assert operation.num_options == len(operation.words) + len(operation.counts)
    for position, argument in enumerate(arguments):
        if position in operation.words:
            assert {kinds[type(x)] for x in operation.words[position].values()} == {str(argument.type)}
        elif position in operation.counts:
            assert str(argument.type) == "int"
        else:
            assert str(argument.type) in ("Tensor", "Optional[Tensor]", "Optional[int]")
    assert {arguments[position].name for position in operation.codes_to_widen} <= {
        "values",
        "queries",
        "weights",
        "old_values",
        "old_weights",
    }


def test_private_names_of_torch_stand_in_one_file():
    private = re.compile(r"\btorch(\.\w+)*\._[a-zA-Z]|from torch(\.\w+)*\._?\w* import .*\b_[a-z]|from torch\._")
    for path in PACKAGE.rglob("*.py"):
        if path.name != "torch_private.py":
            assert not private.search(path.read_text()), path
