"""Bad input gets an error that names the argument, what was expected and what came, whichever backend was named.

The guards run before a backend is chosen, so every case is tried with every backend, those that cannot run here too.
"""

import math
import re

import numpy as np
import pytest
import torch
from oracle import Problem, call, flat, problem

import fastkm
from fastkm import MemoryState

B, T, Q, K, C = 2, 3, 4, 5, 6

FUNCTIONS = {
    "solve_addressing": ("mean", "queries", "ridge"),
    "update_posterior": ("state.mean", "state.cov", "weights", "values", "noise_var", "mask"),
    "write": ("state.mean", "state.cov", "values", "noise_var", "ridge", "mask"),
    "read": ("mean", "queries", "ridge"),
    "attractor_read": ("state.mean", "state.cov", "queries", "noise_var", "ridge"),
    "kl_memory": ("state.mean", "state.cov", "prior.mean", "prior.cov"),
}
LETTERS = {
    "mean": "BKC",
    "state.mean": "BKC",
    "state.cov": "BKK",
    "prior.mean": "BKC",
    "prior.cov": "BKK",
    "weights": "BTK",
    "values": "BTC",
    "queries": "BQC",
    "mask": "BT",
}
SIZES = {"B": B, "T": T, "Q": Q, "K": K, "C": C}
OPTIONS = {"attractor_read": {"clean": torch.tanh, "num_iters": 3}}
BACKENDS = ("reference", "native", "triton", None)

TENSORS = [(f, name) for f, names in FUNCTIONS.items() for name in names if len(LETTERS.get(name, "")) == 3]
VARIANCES = [(f, name) for f, names in FUNCTIONS.items() for name in names if name in ("noise_var", "ridge")]
MASKS = [(f, name) for f, names in FUNCTIONS.items() for name in names if name == "mask"]
IDS = "-".join

# Every axis of every tensor whose size some other tensor of the call shares.
SHARED = [
    pytest.param(f, name, axis, id=f"{f}-{name}-{axis}")
    for f, name in TENSORS
    for axis, letter in enumerate(LETTERS[name])
    if sum(LETTERS.get(other, "").count(letter) for other in FUNCTIONS[f]) > 1
]


def arguments(function, dtype=torch.float32):
    p = problem(B, T, Q, K, C, dtype)
    known = {
        "mean": p.state.mean,
        "state.mean": p.state.mean,
        "state.cov": p.state.cov,
        "prior.mean": p.state.mean,
        "prior.cov": p.state.cov,
        "weights": p.weights,
        "values": p.values,
        "queries": p.queries,
        "noise_var": 0.7,
        "ridge": 0.8,
        "mask": torch.ones(B, T, dtype=torch.bool),
    }
    return {name: known[name] for name in FUNCTIONS[function]}


def run(function, given, **options):
    """Call a public function with its arguments by the names its errors use."""
    given, positional = dict(given), []
    for state in ("state", "prior"):
        if f"{state}.mean" in given:
            positional.append(MemoryState(given.pop(f"{state}.mean"), given.pop(f"{state}.cov")))
    options = OPTIONS.get(function, {}) | options
    if "mask" in given:
        options["mask"] = given.pop("mask")
    return getattr(fastkm, function)(*positional, *given.values(), **options)


def refused(function, error, pattern, *, options=None, **changes):
    """Every backend refuses the call in the same words, whether or not it wants a gradient."""
    given = arguments(function) | changes
    for backend in BACKENDS:
        for wanted in (given, {name: with_gradient(x) for name, x in given.items()}):
            with pytest.raises(error, match=pattern):
                run(function, wanted, backend=backend, **(options or {}))


def with_gradient(x):
    return x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("function", FUNCTIONS)
def test_good_arguments_pass(function):
    run(function, arguments(function))


# ---------------------------------------------------------------------------------------------------- shape and rank


@pytest.mark.parametrize(("function", "name"), TENSORS, ids=map(IDS, TENSORS))
def test_wrong_rank(function, name):
    value = arguments(function)[name]
    for wrong in (value[0], value.unsqueeze(0), value.flatten()[0]):
        refused(
            function,
            ValueError,
            rf"^{name} must have shape \[.*got {re.escape(str(list(wrong.shape)))}",
            **{name: wrong},
        )


@pytest.mark.parametrize(("function", "name", "axis"), SHARED)
def test_size_that_disagrees(function, name, axis):
    """The error names the first argument that disagrees with those before it, and the shape it should have had."""
    shape = [SIZES[letter] for letter in LETTERS[name]]
    shape[axis] += 1
    tensors = [other for other in FUNCTIONS[function] if other in LETTERS]
    later = "|".join(map(re.escape, tensors[tensors.index(name) :]))
    refused(function, ValueError, rf"^({later}) must have shape \[.*\], got \[[\d, ]+\]$", **{name: torch.randn(shape)})


@pytest.mark.parametrize(
    ("function", "name", "shape", "expected"),
    [
        ("write", "values", (2, 3, 7), "[B, T, C] = [2, 3, 6]"),
        ("write", "state.cov", (2, 5, 6), "[B, K, K] = [2, 5, 5]"),
        ("update_posterior", "weights", (2, 3, 6), "[B, T, K] = [2, 3, 5]"),
        ("update_posterior", "values", (2, 4, 6), "[B, T, C] = [2, 3, 6]"),
        ("read", "queries", (3, 4, 6), "[B, Q, C] = [2, Q, 6]"),
        ("read", "mean", (5, 6), "[B, K, C]"),
    ],
)
def test_the_expected_shape_is_computed_from_the_arguments_before(function, name, shape, expected):
    pattern = f"^{re.escape(f'{name} must have shape {expected}, got {list(shape)}')}$"
    refused(function, ValueError, pattern, **{name: torch.randn(shape)})


# --------------------------------------------------------------------------------------------- kind, dtype and device


@pytest.mark.parametrize(("function", "name"), TENSORS, ids=map(IDS, TENSORS))
@pytest.mark.parametrize("kind", [np.ndarray, list, type(None)], ids=lambda kind: kind.__name__)
def test_not_a_tensor(function, name, kind):
    value = arguments(function)[name]
    wrong = {np.ndarray: value.numpy(), list: value.tolist(), type(None): None}[kind]
    refused(function, TypeError, rf"^{name} must be a tensor of shape \[.*\], got {kind.__name__}$", **{name: wrong})


@pytest.mark.parametrize(("function", "name"), TENSORS, ids=map(IDS, TENSORS))
def test_mixed_dtypes(function, name):
    given = arguments(function)
    first = next(iter(given))
    if name == first:
        second = list(given)[1]
        pattern = rf"^{second} must be float64 like {first}, got float32$"
    else:
        pattern = rf"^{name} must be float32 like {first}, got float64$"
    refused(function, TypeError, pattern, **{name: given[name].double()})


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64], ids=str)
def test_dtype_that_is_not_computed_in(function, other):
    given = arguments(function)
    wrong = {name: x.to(other) if isinstance(x, torch.Tensor) and name != "mask" else x for name, x in given.items()}
    name = str(other).removeprefix("torch.")
    refused(function, TypeError, rf"^{next(iter(given))} must be float32 or float64, got {name}$", **wrong)


@pytest.mark.parametrize(("function", "name"), TENSORS, ids=map(IDS, TENSORS))
def test_mixed_devices(function, name):
    given = arguments(function)
    first, second = list(given)[:2]
    pattern = rf"^{second} must be on meta like {first}, got cpu$"
    if name != first:
        pattern = rf"^{name} must be on cpu like {first}, got meta$"
    refused(function, ValueError, pattern, **{name: given[name].to("meta")})


@pytest.mark.parametrize(("function", "name"), VARIANCES + MASKS, ids=map(IDS, VARIANCES + MASKS))
def test_device_of_variances_and_masks(function, name):
    value = torch.ones(B, T, dtype=torch.bool) if name == "mask" else torch.ones(B)
    first = FUNCTIONS[function][0]
    refused(function, ValueError, rf"^{name} must be on cpu like {first}, got meta$", **{name: value.to("meta")})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_state(function):
    if FUNCTIONS[function][0] == "state.mean":
        rest = [torch.ones(1)] * (len(FUNCTIONS[function]) - 2 - ("mask" in FUNCTIONS[function]))
        with pytest.raises((TypeError, ValueError)):
            getattr(fastkm, function)(None, *rest, **OPTIONS.get(function, {}))


# ------------------------------------------------------------------------------------------------ variances and ridges


@pytest.mark.parametrize(("function", "name"), VARIANCES, ids=map(IDS, VARIANCES))
@pytest.mark.parametrize("value", [0, 0.0, -1.0, -1e-30, math.nan, math.inf, -math.inf])
def test_variance_must_be_positive_and_finite(function, name, value):
    refused(function, ValueError, rf"^{name} must be positive and finite.*got", **{name: value})
    for shape in ((), (B,)):
        tensor = torch.ones(shape)
        tensor.view(-1)[-1] = value
        refused(function, ValueError, rf"^{name} must be positive and finite.*got", **{name: tensor})


@pytest.mark.parametrize("function", ["update_posterior", "write"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_noise_of_every_pattern_must_be_positive_and_finite(function, value):
    noise_var = torch.ones(B, T)
    noise_var[1, 2] = value
    refused(function, ValueError, r"^noise_var must be positive and finite.*got", noise_var=noise_var)


@pytest.mark.parametrize(("function", "name"), VARIANCES, ids=map(IDS, VARIANCES))
@pytest.mark.parametrize("value", [1e-60, 1e60])
def test_variance_must_be_positive_and_finite_in_the_dtype_of_the_call(function, name, value):
    """As a float32 these are 0 and inf."""
    refused(function, ValueError, rf"^{name} must be positive and finite.*got", **{name: value})


@pytest.mark.parametrize(("function", "name"), VARIANCES, ids=map(IDS, VARIANCES))
def test_variance_of_the_wrong_shape(function, name):
    shapes = [(B + 1,), (1,), (1, 1, 1), (B, T, 1), (T, B)]
    if name == "ridge" or function == "attractor_read":
        shapes.append((B, T))
    for shape in shapes:
        pattern = rf"^{name} must be a float or a tensor of shape .*, got {re.escape(str(list(shape)))}$"
        refused(function, ValueError, pattern, **{name: torch.ones(shape)})


@pytest.mark.parametrize(("function", "name"), VARIANCES, ids=map(IDS, VARIANCES))
@pytest.mark.parametrize("value", [True, None, "1.0", [1.0, 1.0], 1j], ids=repr)
def test_variance_of_the_wrong_kind(function, name, value):
    kind = type(value).__name__
    refused(function, TypeError, rf"^{name} must be a float or a tensor, got {kind}$", **{name: value})


@pytest.mark.parametrize(("function", "name"), VARIANCES, ids=map(IDS, VARIANCES))
@pytest.mark.parametrize("other", [torch.float64, torch.float16, torch.int64, torch.bool], ids=str)
def test_variance_of_the_wrong_dtype(function, name, other):
    got = str(other).removeprefix("torch.")
    pattern = rf"^{name} must be float32 like {FUNCTIONS[function][0]}, got {got}$"
    for shape in ((), (B,)):
        refused(function, TypeError, pattern, **{name: torch.ones(shape, dtype=other)})


# ------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("function", ["update_posterior", "write"])
def test_mask_of_the_wrong_shape_or_kind(function):
    for shape in ((T,), (B,), (B, T + 1), (B + 1, T), (B, T, 1), (T, B), ()):
        pattern = rf"^mask must have shape \[B, T\] = \[2, 3\], got {re.escape(str(list(shape)))}$"
        refused(function, ValueError, pattern, mask=torch.ones(shape, dtype=torch.bool))
    for dtype in (torch.float32, torch.int64, torch.uint8):
        got = str(dtype).removeprefix("torch.")
        pattern = rf"^mask must be a bool tensor of shape \[B, T\] = \[2, 3\], got {got}$"
        refused(function, TypeError, pattern, mask=torch.ones(B, T, dtype=dtype))
    for value in (True, [[True] * T] * B, np.ones((B, T), dtype=bool)):
        refused(function, TypeError, rf"^mask must be a bool tensor.*got {type(value).__name__}$", mask=value)


@pytest.mark.parametrize(("function", "name"), VARIANCES, ids=map(IDS, VARIANCES))
def test_a_subnormal_variance_is_refused_as_a_number_and_as_a_tensor(function, name):
    for value in (1e-40, torch.tensor(1e-40), torch.full((B,), 1e-40)):
        refused(function, ValueError, rf"^{name} must be positive and finite.*float32, got", **{name: value})


# ------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn], ids=["sparse", "mkldnn"])
@pytest.mark.parametrize(("function", "name"), TENSORS, ids=map(IDS, TENSORS))
def test_a_layout_without_strides_is_refused(function, name, change):
    value = change(arguments(function)[name])
    for backend in BACKENDS:
        with pytest.raises(TypeError, match=rf"^{name} must be a dense tensor, got a tensor of layout"):
            run(function, arguments(function) | {name: value}, backend=backend)


# ----------------------------------------------------------------------------------------------------------- options


COUNTS = [("write", "num_opt_iters"), ("read", "num_iters"), ("attractor_read", "num_iters")]


@pytest.mark.parametrize(("function", "name"), COUNTS, ids=map(IDS, COUNTS))
def test_counts(function, name):
    for value in (0, -1):
        refused(function, ValueError, rf"^{name} must be at least 1, got {value}$", options={name: value})
    for value in (1.0, True, "1", None, torch.tensor(2)):
        refused(function, TypeError, rf"^{name} must be an int, got {type(value).__name__}$", options={name: value})


@pytest.mark.parametrize("function", ["solve_addressing", "write", "read"])
def test_unknown_method(function):
    for method in ("Ridge", "", None, 1):
        pattern = rf"^method must be one of 'ridge', 'deepmind', got {re.escape(repr(method))}$"
        refused(function, ValueError, pattern, options={"method": method})


def test_unknown_method_of_kl_memory():
    refused(
        "kl_memory",
        ValueError,
        r"^method must be one of 'exact', 'deepmind', got 'ridge'$",
        options={"method": "ridge"},
    )


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ["cuda", "Native", "", "cpu"])
def test_unknown_backend(function, name):
    pattern = rf"^backend must be one of 'native', 'triton', 'reference' or None, got '{name}'$"
    with pytest.raises(ValueError, match=pattern):
        run(function, arguments(function), backend=name)


@pytest.mark.parametrize("name", ["weight_var", "tol"])
def test_attractor_numbers(name):
    for value in (-1.0, math.nan, math.inf):
        pattern = rf"^{name} must be finite and at least 0, got {value}$"
        refused("attractor_read", ValueError, pattern, options={name: value})
    for value in (True, "0", *([torch.tensor(0.1)] if name == "tol" else [])):
        pattern = rf"^{name} must be a float, got {type(value).__name__}$"
        refused("attractor_read", TypeError, pattern, options={name: value})


def test_the_variance_of_weights_may_be_a_positive_tensor():
    for value in (0.0, -1.0, math.nan):
        pattern = r"^weight_var must be positive and finite.*got"
        refused("attractor_read", ValueError, pattern, options={"weight_var": torch.tensor(value)})


def test_clean_must_be_callable():
    for value in (None, torch.ones(2), "tanh"):
        pattern = rf"^clean must be a callable from codes to codes, got {type(value).__name__}$"
        refused("attractor_read", TypeError, pattern, options={"clean": value})


# -------------------------------------------------------------------------------- matrices that cannot be factored


def sick(p, which, disease):
    cov = p.state.cov.clone()
    for b in which:
        if disease == "asymmetric":
            cov[b, 0, 1] += 0.1
        elif disease == "indefinite":
            cov[b] -= (torch.linalg.eigvalsh(cov[b].double()).max() * 1.1).to(cov.dtype) * torch.eye(K, dtype=cov.dtype)
        elif disease == "slightly indefinite":
            # One eigenvalue of −0.05, along the first pattern's own weights (and the mean's rows, which a write uses).
            cov[b] = torch.eye(K, dtype=cov.dtype)
            v = torch.nn.functional.normalize(p.weights[b, 0], dim=0)
            cov[b] -= 1.05 * torch.outer(v, v)
            cov[b] = (cov[b] + cov[b].mT) / 2
        elif disease == "nan":
            cov[b, 2, 2] = math.nan
        elif disease == "infinite":
            cov[b, 1, 1] = math.inf
    return p._replace(state=p.state._replace(cov=cov))


COVARIANCES = ["update_posterior", "remove_patterns", "replace_patterns", "filter_posterior", "write", "kl_memory"]
WHICH = [[2], [0, 3], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("which", WHICH, ids=str)
@pytest.mark.parametrize("disease", ["asymmetric", "indefinite", "nan", "infinite"])
def test_covariance_that_is_none(disease, which, operation, backend, dtype):
    """Exactly the sick memories are named; nothing is handed back."""
    if operation not in COVARIANCES:
        with_sick = call(operation, sick(problem(5, 4, 3, K, C, dtype), which, "asymmetric"), backend)
        assert all(x.isfinite().all() for x in flat(with_sick).values())  # the mean alone is factored
        return
    words = {"asymmetric": "not symmetric", "indefinite": "not positive definite"}.get(disease, "not finite")
    memories = rf"{'memory' if len(which) == 1 else 'memories'} {re.escape(str(which))}"
    p = sick(problem(5, 4, 3, K, C, dtype), which, disease)
    for state in (p.state, MemoryState(*map(with_gradient, p.state))):
        with pytest.raises(torch.linalg.LinAlgError, match=rf"state\.cov.* is {words} in {memories}$"):
            call(operation, p._replace(state=state), backend)


def test_negative_direction_in_the_patterns_weights(backend, dtype):
    """An eigenvalue of −0.05 against σ² of ½ and more: S stays positive definite, but its pivot falls below σ²."""
    with pytest.raises(torch.linalg.LinAlgError, match=r"state\.cov is not positive definite in memories \[1, 4\]$"):
        call("update_posterior", sick(problem(5, 4, 3, K, C, dtype), [1, 4], "slightly indefinite"), backend)


@pytest.mark.parametrize("operation", ["update_posterior", "write"])
@pytest.mark.parametrize(("times", "refused"), [(1 / 50, False), (50, True)], ids=["rounding", "more than rounding"])
def test_a_covariance_is_indefinite_by_more_than_rounding(times, refused, operation, backend, dtype):
    """A variance may fall below σ² by ``4 (K + T) eps`` of itself: what rounding makes of one that is σ² exactly."""
    mean, cov = torch.zeros(1, K, 2, dtype=dtype), torch.eye(K, dtype=dtype).unsqueeze(0)
    mean[0, 0, 0] = 1
    weights, values = torch.zeros(1, 1, K, dtype=dtype), torch.tensor([[[2.0, 0.0]]], dtype=dtype)
    weights[0, 0, 0] = 1  # which is also where a write with λ = 1 finds the pattern
    cov[0, 0, 0] = -times * 4 * (K + 1) * torch.finfo(dtype).eps
    one = torch.ones(1, 1, dtype=dtype)
    p = Problem(MemoryState(mean, cov), weights, values, values, one, one[0], None)
    if refused:
        with pytest.raises(torch.linalg.LinAlgError, match=r"state\.cov is not positive definite in memory \[0\]$"):
            call(operation, p, backend)
    else:
        assert call(operation, p, backend).innovation_var.item() == 1


@pytest.mark.parametrize("operation", COVARIANCES)
@pytest.mark.parametrize(("times", "refused"), [(1 / 5, False), (5, True)], ids=["rounding", "more than rounding"])
@pytest.mark.parametrize("size", [K, 33])  # of whole vectors and of what is left of them
def test_a_covariance_is_asymmetric_by_more_than_rounding(size, times, refused, operation, backend, dtype):
    """Two entries across the diagonal may differ by ``√eps`` of the largest."""
    for row, column in ((1, 0), (size - 1, 0), (size - 1, size - 2)):
        p = problem(1, 2, 1, size, 3, dtype)
        cov = p.state.cov.clone()
        cov[0, row, column] += times * torch.finfo(dtype).eps ** 0.5 * cov.abs().max()
        p = p._replace(state=p.state._replace(cov=cov))
        if refused:
            with pytest.raises(torch.linalg.LinAlgError, match=r"is not symmetric in memory \[0\]$"):
                call(operation, p, backend)
        else:
            call(operation, p, backend)


def test_two_diseases_at_once(backend, dtype):
    p = sick(sick(problem(5, 4, 3, K, C, dtype), [1], "asymmetric"), [0, 4], "indefinite")
    pattern = r"state\.cov is not symmetric in memory \[1\] and not positive definite in memories \[0, 4\]$"
    for operation in ("update_posterior", "filter_posterior", "write"):
        with pytest.raises(torch.linalg.LinAlgError, match=pattern):
            call(operation, p, backend)


def test_rounding_is_not_asymmetry(operation, backend, dtype):
    p = problem(3, 4, 3, K, C, dtype)
    cov = p.state.cov.clone()
    cov[:, 0, 1] *= 1 + 4 * torch.finfo(dtype).eps
    call(operation, p._replace(state=p.state._replace(cov=cov)), backend)


def test_covariance_of_a_long_write_is_taken_again(backend, dtype):
    """What write returns is always good enough to write to."""
    p = problem(2, 150, 1, 9, 8, dtype)
    for _ in range(3):
        p = p._replace(state=call("write", p, backend).state)


@pytest.mark.parametrize("options", [{}, {"num_opt_iters": 2}], ids=str)
def test_a_gram_matrix_that_is_singular_in_its_dtype(options, operation, backend, dtype):
    """Two equal rows and a ridge that vanishes beside them: the second pivot is zero, exactly."""
    if operation not in ("solve_addressing", "read", "write") or (options and operation != "write"):
        return
    p = problem(3, 1, 1, 2, 4, dtype)
    mean, ridge = p.state.mean.clone(), p.ridge.clone()
    mean[1], ridge[1] = 1, 1e-30
    p = p._replace(state=p.state._replace(mean=mean), ridge=ridge)
    words = r"^mean meanᵀ \+ ridge I is not positive definite in memory \[1\]: .* a larger ridge$"
    with pytest.raises(torch.linalg.LinAlgError, match=words):
        call(operation, p, backend, **options)


def test_mean_that_is_not_a_number(operation, backend, dtype):
    p = problem(4, 3, 3, K, C, dtype)
    mean = p.state.mean.clone()
    mean[1, 2, 3] = math.nan
    p = p._replace(state=p.state._replace(mean=mean))
    if operation in ("solve_addressing", "read", "attractor_read", "write"):
        with pytest.raises(torch.linalg.LinAlgError, match=r"^(state\.)?mean is not finite in memory \[1\]$"):
            call(operation, p, backend)
