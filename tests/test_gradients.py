"""Gradients of the native kernels, held to finite differences, to the reference, and to their own theorems."""

import functools

import oracle
import pytest
import torch
from oracle import EMPTY_SHAPES, Problem, call, flat, largest, map_tensors, poisoned, problem
from test_registration import arguments

import fastkm
from fastkm import KanervaMemory, MemoryState
from fastkm._runtime import schema
from fastkm.testing.presets import PRESETS

pytestmark = pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))

METHODS = ("ridge", "deepmind")
CASES = {
    "update_posterior": [{}],
    "update_square_root": [{}],
    "remove_patterns": [{}],
    "replace_patterns": [{}],
    "filter_posterior": [{}, {"read": "before"}],
    "write": [{"num_opt_iters": n, "method": method} for n in (1, 2, 3) for method in METHODS],
    "read": [{"num_iters": n, "method": method} for n in (1, 3) for method in METHODS],
    "solve_addressing": [{"method": method} for method in METHODS],
    "kl_memory": [{}],
    "logdet": [{}],
}
USES = {  # the tensors of a problem that an operation is a function of
    "update_posterior": ("mean", "cov", "weights", "values", "noise_var"),
    "update_square_root": ("mean", "cov", "weights", "values", "noise_var"),
    "remove_patterns": ("mean", "cov", "weights", "values", "noise_var"),
    "replace_patterns": ("mean", "cov", "weights", "values", "noise_var"),
    # its queries are made of the weights, its retention of the noise, and the variance of its prior is the ridge
    "filter_posterior": ("mean", "cov", "weights", "values", "noise_var", "ridge"),
    "write": ("mean", "cov", "values", "noise_var", "ridge"),
    "read": ("mean", "queries", "ridge"),
    "solve_addressing": ("mean", "queries", "ridge"),
    "kl_memory": ("mean", "cov"),
    "logdet": ("cov",),
}
# Their arguments are made of the problem, by the caller.
MAKES_ARGUMENTS = ("kl_memory", "filter_posterior", "remove_patterns", "replace_patterns", "update_square_root")
# B, T, Q, K, C: one of everything, rows beside the vector widths, C < K, K < T, and T in several chunks.
SHAPES = [(1, 1, 1, 1, 1), (3, 5, 3, 13, 6), (2, 9, 2, 4, 7), (2, 3, 9, 3, 40), (2, 33, 6, 31, 20), (2, 70, 3, 17, 9)]

every_operation = pytest.mark.parametrize("operation", CASES)
every_case = pytest.mark.parametrize(
    ("operation", "options"),
    [pytest.param(o, options, id="-".join([o, *map(str, options.values())])) for o in CASES for options in CASES[o]],
)


def run(operation, p: Problem, backend, **options) -> dict:
    if operation == "logdet":
        return {"logdet": fastkm.matrix_normal.logdet(p.state.cov, backend=backend)}
    return flat(call(operation, p, backend, **options))


def leaves(operation, p: Problem) -> dict:
    """The tensors the operation is differentiated by."""
    named = p.state._asdict() | p._asdict()
    return {name: named[name].detach().requires_grad_() for name in USES[operation]}


def replaced(p: Problem, changed: dict) -> Problem:
    named = p.state._asdict() | p._asdict() | changed
    return Problem(MemoryState(named["mean"], named["cov"]), *(named[name] for name in Problem._fields[1:]))


def cotangents(outputs: dict) -> dict:
    normal = functools.partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {name: normal(x.shape).to(x.dtype) for name, x in outputs.items()}


def gradients(operation, p: Problem, backend, *, given: dict | None = None, **options) -> dict:
    """Of the outputs ``given`` a cotangent, by default all; ``cov`` symmetrised, as only that is defined."""
    inputs = leaves(operation, p)
    outputs = run(operation, replaced(p, inputs), backend, **options)
    given = cotangents(outputs) if given is None else given
    used = [name for name in given if outputs[name].requires_grad]
    found = torch.autograd.grad(
        [outputs[name] for name in used],
        list(inputs.values()),
        [given[name] for name in used],
        materialize_grads=True,
    )
    found = dict(zip(inputs, found, strict=True))
    if "cov" in found:
        found["cov"] = found["cov"] + found["cov"].mT
    return found


def assert_same(actual: dict, expected: dict, tolerance: float = 1e-10) -> None:
    """Two float64 computations of one gradient; a gradient is as ill-conditioned as the square of its solve."""
    for name, truth in expected.items():
        wrong = oracle.error(actual[name], truth)
        assert wrong <= tolerance * largest(truth), f"{name}: error {wrong:.3g} of {largest(truth):.3g}"


# --------------------------------------------------------------------------------------------------- finite differences


@pytest.mark.parametrize("masked", [False, True])
@every_case
def test_finite_differences(operation, options, masked):
    """Every output, by every input at once; ``cov = A Aᵀ + I`` is differentiated by A, so that it stays symmetric."""
    p = problem(2, 3, 2, 3, 2, masked=masked)
    if masked:
        p = p._replace(mask=torch.tensor([[True, False, True], [False, True, True]]))
    inputs = leaves(operation, p)

    def outputs(*tensors):
        changed = dict(zip(inputs, tensors, strict=True))
        if "cov" in changed:
            root = changed["cov"]
            changed["cov"] = root @ root.mT + torch.eye(root.shape[-1]).to(root)
        return tuple(run(operation, replaced(p, changed), "native", **options).values())

    assert torch.autograd.gradcheck(outputs, tuple(inputs.values()))


# -------------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_case
def test_equals_the_reference(operation, options, shape, masked):
    p = problem(*shape, masked=masked)
    assert_same(gradients(operation, p, "native", **options), gradients(operation, p, "reference", **options))


@every_operation
def test_each_output_alone(operation):
    """The cotangents of the other outputs are None."""
    p = problem(2, 5, 3, 4, 6, masked=True)
    for name, cotangent in cotangents(run(operation, p, "native")).items():
        given = {name: cotangent}
        assert_same(gradients(operation, p, "native", given=given), gradients(operation, p, "reference", given=given))


@every_operation
def test_each_input_alone(operation):
    """An input that needs no gradient gets none, and changes none of the others."""
    p = problem(2, 5, 3, 4, 6)
    together = gradients(operation, p, "native")
    for name in USES[operation]:
        x = leaves(operation, p)[name]
        inputs = {other: y.detach() for other, y in leaves(operation, p).items()} | {name: x}
        outputs = run(operation, replaced(p, inputs), "native")
        torch.autograd.backward(list(outputs.values()), list(cotangents(outputs).values()))
        assert torch.equal(x.grad + x.grad.mT if name == "cov" else x.grad, together[name]), name
        assert all(y.grad is None for other, y in inputs.items() if other != name)


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
@every_operation
def test_nothing_has_the_gradient_it_has_in_the_reference(operation, shape):
    p = problem(*shape)
    assert_same(gradients(operation, p, "native"), gradients(operation, p, "reference"))


@pytest.mark.parametrize("shape", ["float", "0-d", "B", "BT"])
@pytest.mark.parametrize("operation", ["update_posterior", "write", "read", "solve_addressing"])
def test_noise_and_ridge_get_gradients_of_their_own_shape(operation, shape):
    """One number for all patterns is the sum over patterns; a float has none, and the others have theirs beside it."""
    p = problem(2, 5, 3, 4, 6)
    found = {}
    for backend in ("native", "reference"):
        noise, ridge = p.noise_var, p.ridge
        if shape != "BT":
            noise, ridge = (noise[:, 0], ridge) if shape == "B" else (noise[0, 0], ridge[0])
        inputs = leaves(operation, p._replace(noise_var=noise, ridge=ridge))
        given = replaced(p, inputs)
        if shape == "float":
            inputs = {name: x for name, x in inputs.items() if name not in ("noise_var", "ridge")}
            given = given._replace(noise_var=noise.item(), ridge=ridge.item())
        outputs = run(operation, given, backend).values()
        sum(x.square().sum() for x in outputs).backward()
        assert all(x.grad.shape == x.shape for x in inputs.values())
        found[backend] = {name: x.grad + x.grad.mT if name == "cov" else x.grad for name, x in inputs.items()}
    assert_same(found["native"], found["reference"])


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "guarded"])
def test_what_a_hook_raises_is_raised_once(plain):
    """What is not the operator's refusal is the caller's own, and no reason to compute again."""
    p, packed = problem(2, 5, 3, 4, 6, torch.float32), []
    values = p.values if plain else p.values.bfloat16()  # which the operator does not take

    def pack(x):
        packed.append(x)
        raise RuntimeError("no room")

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        pytest.raises(RuntimeError, match="no room"),
    ):
        fastkm.write(p.state._replace(mean=p.state.mean.requires_grad_()), values, 1.0, 1.0, backend="native")
    assert len(packed) == 1


@pytest.mark.parametrize("operation", ["read", "solve_addressing"])
@pytest.mark.parametrize("method", METHODS)
def test_many_queries(operation, method):
    """More than a tile of them, and the last tile not full."""
    p = problem(2, 0, 150, 5, 6)
    options = {"method": method}
    assert_same(gradients(operation, p, "native", **options), gradients(operation, p, "reference", **options))


# ------------------------------------------------------------------------------------------------------- hostile memory


@pytest.mark.parametrize("operation", ["read", "solve_addressing"])
@pytest.mark.parametrize("shape", [(2, 0, 5, 128, 40), (1, 0, 70, 131, 65), (1, 0, 3, 200, 1)], ids=str)
def test_memories_with_short_codes(operation, shape):
    """A CPU kernel may solve their systems in C."""
    p = problem(*shape)
    assert_same(gradients(operation, p, "native"), gradients(operation, p, "reference"))


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@every_operation
def test_layout_means_nothing(operation, layout):
    """Inputs and cotangents that are views into NaN."""
    p = problem(3, 5, 4, 7, 6, masked=True)
    change = functools.partial(poisoned, layout=layout)
    given = {name: change(x) for name, x in cotangents(run(operation, p, "native")).items()}
    displaced = gradients(operation, map_tensors(p, change), "native", given=given)
    for name, expected in gradients(operation, p, "native").items():
        assert torch.equal(displaced[name], expected), name


@every_operation
def test_expanded_inputs_and_cotangents(operation):
    """One memory, seen B times, gets the sum of the gradients of its copies."""
    one, many = problem(1, 3, 2, 5, 4), map_tensors(problem(1, 3, 2, 5, 4), lambda x: x.expand(3, *x.shape[1:]))
    given = {name: torch.ones_like(x) for name, x in run(operation, one, "native").items()}
    once = gradients(operation, one, "native", given=given)
    inputs = leaves(operation, one)
    expanded = {name: x.expand(3, *x.shape[1:]) for name, x in inputs.items()}
    sum(x.sum() for x in run(operation, replaced(many, expanded), "native").values()).backward()
    for name, x in inputs.items():
        oracle.assert_close(x.grad + x.grad.mT if name == "cov" else x.grad, 3 * once[name], name)


@pytest.mark.parametrize("operation", ["update_posterior", "write"])
def test_masked_patterns_get_no_gradient_whatever_they_hold(operation):
    p = problem(3, 9, 2, 5, 4, masked=True)
    off = ~p.mask.unsqueeze(-1)
    dirty = p._replace(values=p.values.masked_fill(off, torch.nan), weights=p.weights.masked_fill(off, torch.nan))
    clean, found = gradients(operation, p, "native"), gradients(operation, dirty, "native")
    assert (found["values"].masked_select(off) == 0).all()
    for name, expected in clean.items():
        assert torch.equal(found[name], expected), name


# ------------------------------------------------------------------------------------------------------------- theorems


@pytest.mark.parametrize("options", CASES["write"], ids=str)
def test_two_segments_have_the_gradients_of_the_whole(options):
    """Writing 40 patterns is writing 17 and then 23, and so are its gradients, through the state between them."""
    p = problem(2, 40, 1, 5, 6)
    whole, parts = (leaves("write", p) for _ in range(2))
    cotangent = torch.randn(p.state.mean.shape, dtype=torch.float64)

    def write(state, inputs, now):
        state = state or MemoryState(inputs["mean"], inputs["cov"])
        values, noise_var = inputs["values"][:, now], inputs["noise_var"][:, now]
        return fastkm.write(state, values, noise_var, inputs["ridge"], backend="native", **options).state

    first = write(None, parts, slice(17))
    for inputs, state in ((whole, write(None, whole, slice(None))), (parts, write(first, parts, slice(17, None)))):
        ((state.mean * cotangent).sum() + state.cov.square().sum()).backward()
        inputs["cov"].grad += inputs["cov"].grad.mT.clone()
    assert_same({name: x.grad for name, x in parts.items()}, {name: x.grad for name, x in whole.items()})


def test_order_of_patterns_means_nothing_to_the_posterior():
    p, order = problem(2, 40, 1, 5, 6), torch.randperm(40)
    shuffled = p._replace(weights=p.weights[:, order], values=p.values[:, order], noise_var=p.noise_var[:, order])
    given = cotangents(run("update_posterior", p, "native"))
    for output in ("mean", "cov", "log_evidence"):
        expected = gradients("update_posterior", p, "native", given={output: given[output]})
        found = gradients("update_posterior", shuffled, "native", given={output: given[output]})
        for name in ("weights", "values", "noise_var"):
            expected[name] = expected[name][:, order]
        assert_same(found, expected)


def test_gradient_of_the_log_evidence_is_the_score():
    """∂ ln p(Z|W) / ∂Z = −S⁻¹ (Z − WR), the residuals weighed by the precision of the patterns."""
    p = problem(2, 40, 1, 5, 6)
    values = p.values.clone().requires_grad_()
    fastkm.update_posterior(p.state, p.weights, values, p.noise_var, backend="native").log_evidence.sum().backward()
    predictive = p.weights @ p.state.cov @ p.weights.mT + torch.diag_embed(p.noise_var)
    factor = torch.linalg.cholesky(predictive)
    oracle.assert_close(values.grad, -torch.cholesky_solve(p.values - p.weights @ p.state.mean, factor))


# ----------------------------------------------------------------------------------------------------- float32, presets


ROW_AXES = {"mean": (1,), "cov": (1, 2), "weights": (2,)}


def with_rows(named: dict, order) -> dict:
    """The same memory with its rows in another order."""
    for name, x in named.items():
        for axis in ROW_AXES.get(name, ()):
            x = x.index_select(axis, order)
        named = named | {name: x}
    return named


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
@pytest.mark.parametrize("operation", ["update_posterior", "filter_posterior", "write", "read", "kl_memory"])
def test_float32_is_as_good_as_the_reference_in_float32(operation, preset):
    """At most three times as wrong, each against the reference in float64.

    The reference's own error is the worst over draws of its rounding: the same problem with its rows in another order.
    """
    p = problem(1 if preset.K > 128 else 4, preset.T, 4, preset.K, preset.C, torch.float32)
    truth = gradients(operation, map_tensors(p, torch.Tensor.double), "reference")
    given, own = cotangents(run(operation, p, "native")), dict.fromkeys(truth, 0.0)
    for seed in range(4 if preset.K > 128 else 8):
        order = torch.randperm(preset.K, generator=torch.Generator().manual_seed(seed))
        drawn = replaced(p, with_rows(p.state._asdict() | {"weights": p.weights}, order))
        found = gradients(operation, drawn, "reference", given=with_rows(given, order))
        found = with_rows(found, order.argsort())
        own = {name: max(own[name], oracle.error(found[name], truth[name])) for name in truth}
    found = gradients(operation, p, "native")
    for name, expected in truth.items():
        wrong = oracle.error(found[name], expected)
        bound = 3 * (own[name] + torch.finfo(torch.float32).eps * largest(expected))
        assert wrong <= bound, f"{name}: error {wrong:.3g} exceeds {bound:.3g}"


# -------------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("threads", [1, 2])
@every_case
def test_gradients_are_the_same_bits_from_run_to_run_and_in_any_batch(operation, options, threads, dtype):
    torch.set_num_threads(threads)
    p = problem(5, 37, 3, 9, 6, dtype, masked=True)
    once, given = gradients(operation, p, "native", **options), cotangents(run(operation, p, "native", **options))
    for name, again in gradients(operation, p, "native", **options).items():
        assert torch.equal(once[name], again), name
    for row in (0, 3):
        here = slice(row, row + 1)
        memory = map_tensors(p, lambda x, here=here: x[here])
        own = {name: x[here] for name, x in given.items()}
        for name, x in gradients(operation, memory, "native", given=own, **options).items():
            assert torch.equal(x[0], once[name][row]), name


@pytest.mark.parametrize("operation", ["update_posterior", "filter_posterior", "write", "read", "kl_memory", "logdet"])
def test_threads_share_the_gradient_of_one_large_memory(operation):
    p = problem(1, 33, 40, 300, 333)
    one = gradients(operation, p, "native")
    assert_same(one, gradients(operation, p, "reference"))
    torch.set_num_threads(3)
    for name, x in gradients(operation, p, "native").items():
        assert torch.equal(x, one[name]), name


# --------------------------------------------------------------------------------------------------------- what is kept


def test_nothing_is_entered_or_saved_where_no_gradient_is_wanted(monkeypatch):
    def entered(cls, *_):
        raise AssertionError("an autograd.Function was entered")

    monkeypatch.setattr(torch.autograd.Function, "apply", classmethod(entered))
    p = problem(2, 3, 2, 4, 5)
    for operation in CASES:
        wanted = replaced(p, leaves(operation, p))
        assert not any(x.requires_grad for x in run(operation, p, "native").values())
        with torch.no_grad():
            assert not any(x.requires_grad for x in run(operation, wanted, "native").values())
        with torch.inference_mode():
            run(operation, wanted, "native")
        with pytest.raises(AssertionError, match="was entered"):
            run(operation, wanted, "native")


@every_case
def test_only_inputs_and_weights_are_saved(operation, options):
    """Nothing of size T·K·C or T·K·K."""
    p = problem(2, 40, 3, 5, 6, masked=True)
    inputs, saved = leaves(operation, p), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        outputs = run(operation, replaced(p, inputs), "native", **options)
    known = [x.data_ptr() for x in (*inputs.values(), p.mask)] + [
        x.data_ptr() for name, x in outputs.items() if operation == "write" and name == "weights"
    ]
    largest_known = max(x.numel() for x in (*inputs.values(), *outputs.values()))
    assert saved
    for x in saved:
        assert x.numel() <= largest_known
        assert x.data_ptr() in known or operation in MAKES_ARGUMENTS, "made by the caller here"


@every_operation
def test_status_has_no_gradient(operation):
    """The raw function's last output is the status: an integer outside the graph."""
    p = problem(2, 3, 2, 4, 5)
    p = replaced(p, leaves(operation, p))
    native = {
        "update_posterior": lambda: fastkm.posterior.native.update_posterior(*p.state, *p[1:3], p.noise_var, None, 0),
        "update_square_root": lambda: fastkm.square_root.native.update_square_root(
            *p.state, *p[1:3], p.noise_var, None
        ),
        "remove_patterns": lambda: fastkm.removal.native.remove_patterns(*p.state, *p[1:3], p.noise_var, None),
        "replace_patterns": lambda: fastkm.removal.native.replace_patterns(
            *p.state, *p[1:3], *p[1:3], p.noise_var, p.noise_var, None
        ),
        "filter_posterior": lambda: fastkm.filtering.native.filter_posterior(
            *p.state, *p[1:3], p.weights, p.noise_var, None, p.ridge, None, False, None, 0
        ),
        "write": lambda: fastkm.writing.native.write(*p.state, p.values, p.noise_var, p.ridge, 1, False, None, 0),
        "read": lambda: fastkm.reading.native.read(p.state.mean, p.queries, p.ridge, 1, False, 0),
        "solve_addressing": lambda: fastkm.addressing.native.solve_addressing(p.state.mean, p.queries, p.ridge, False),
        "kl_memory": lambda: fastkm.matrix_normal.native.kl_memory(*p.state, *p.state),
        "logdet": lambda: fastkm.matrix_normal.native.logdet(p.state.cov),
    }[operation]
    *outputs, info = native()
    assert all(x.requires_grad for x in outputs)
    assert not info.requires_grad
    assert info.dtype == torch.int32


# --------------------------------------------------------------------------------------------------- the operators, raw


def backward_arguments(operator, p: Problem):
    """Some cotangents given, some None."""
    mean, cov, weights, per_pattern = map(torch.ones_like, (*p.state, p.weights, p.noise_var))
    per_memory = torch.ones_like(p.ridge)
    update = (*p.state, p.weights, p.values, p.noise_var, p.mask, 0)
    filtered = (*p.state, p.weights, p.values, p.weights, p.noise_var, p.noise_var / 2, p.ridge, None, True, p.mask, 0)
    write = (*p.state, p.values, p.noise_var, p.ridge, 2, False, p.mask, 0, p.weights)
    return {
        "update_posterior": (*update, mean, cov, None, per_pattern, per_memory),
        "remove_patterns": (*p.state, 0.05 * p.weights, p.values, p.noise_var, p.mask, mean, cov),
        "update_square_root": (*update[:-1], mean, cov),
        "replace_patterns": (
            *p.state,
            0.05 * p.weights,
            p.values,
            p.weights,
            p.values,
            *[p.noise_var] * 2,
            p.mask,
            mean,
            None,
        ),
        "filter_posterior": (*filtered, mean, None, torch.ones_like(p.values), per_pattern, None, per_memory),
        "write": (*write, mean, None, weights, per_pattern, per_pattern),
        "read": (p.state.mean, p.queries, p.ridge, 2, False, 0, torch.ones_like(p.queries), None),
        "kl_memory": (*p.state, *p.state, per_memory),
        "logdet": (p.state.cov, per_memory),
    }[operator]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (3, 37, 3, 13, 6), (2, 0, 2, 4, 5), (2, 3, 2, 0, 5)], ids=str)
@pytest.mark.parametrize(
    "operator",
    [
        "update_posterior",
        "update_square_root",
        "remove_patterns",
        "replace_patterns",
        "filter_posterior",
        "write",
        "read",
        "kl_memory",
        "logdet",
    ],
)
def test_opcheck_of_the_backward_operators(operator, shape, dtype):
    """Schema, fake, and the traced graph with dynamic shapes."""
    backward = getattr(torch.ops.fastkm, f"{operator}_backward").default
    torch.library.opcheck(backward, backward_arguments(operator, problem(*shape, dtype, masked=True)))


@pytest.mark.parametrize("operator", CASES)
def test_opcheck_of_the_traced_operators(operator):
    """As for the backward ones; of tensors that want no gradient, since the operators themselves carry none."""
    p = problem(3, 37, 3, 13, 6, masked=True)
    torch.library.opcheck(getattr(torch.ops.fastkm, operator).default, arguments(operator, p))


def test_a_backward_operator_refuses_what_does_not_fit():
    p = problem(2, 3, 2, 4, 5)
    given = list(backward_arguments("logdet", p))
    with pytest.raises(RuntimeError, match="shape or dtype"):
        torch.ops.fastkm.logdet_backward(given[0], given[1][:1])
    with pytest.raises(RuntimeError, match="shape or dtype"):
        torch.ops.fastkm.logdet_backward(given[0], given[1].float())


def test_without_a_factor_there_is_no_gradient():
    """The second memory cannot be factored: its gradients are NaN, and those of the others are as without it."""
    p = problem(3, 1, 4, 5, 6)
    mean, cov, ridge = p.state.mean.clone(), p.state.cov.clone(), p.ridge.clone()
    mean[1], ridge[1], cov[1, 2, 2] = 1, 1e-30, -1.0  # equal rows, whose Gram matrix has a second pivot of zero
    for squared in (False, True):
        rest = (p.queries, ridge, 2, squared, 0, torch.ones_like(p.queries), None)
        found = torch.ops.fastkm.read_backward(mean, *rest)
        for x, good in zip(found, torch.ops.fastkm.read_backward(p.state.mean, *rest), strict=True):
            assert x[1].isnan().all()
            assert torch.equal(x[::2], good[::2])
    per_memory = torch.ones_like(ridge)
    assert torch.ops.fastkm.logdet_backward(cov, per_memory).isnan().flatten(1).all(1).tolist() == [False, True, False]
    for state, prior in (((mean, cov), p.state), (p.state, (mean, cov))):
        to_cov, to_prior_cov = torch.ops.fastkm.kl_memory_backward(*state, *prior, per_memory)[1::2]
        assert to_cov[1].isnan().all()
        assert to_cov[::2].isfinite().all()
        assert to_prior_cov[::2].isfinite().all()


# ----------------------------------------------------------------------------------------------------------- the module


@pytest.mark.parametrize("num_opt_iters", [1, 2])
@pytest.mark.parametrize("sampled", [False, True])
def test_every_parameter_of_the_module_trains(sampled, num_opt_iters):
    """And gets the gradient that the reference gives it."""
    found = {}
    for backend in ("native", "reference"):
        torch.manual_seed(0)
        memory = KanervaMemory(
            7, 5, learn_obs_noise=True, sample_w=sampled, sample_memory=sampled, num_opt_iters=num_opt_iters,
            backend=backend,
        ).double()  # fmt: skip
        values = torch.randn(3, 9, 7).double()
        state, weights, _, kl = memory.write(values)
        read = memory.read(values, state, num_iters=2)
        loss = (read.values - values).square().sum() + memory.kl(state).sum() + memory.kl_weights(weights).sum()
        (loss + kl.sum()).backward()
        found[backend] = {name: parameter.grad for name, parameter in memory.named_parameters()}
    assert set(found["native"]) == {"prior_mean", "prior_log_var", "log_weight_stddev", "log_noise_stddev"}
    assert all(x.abs().max() > 0 for x in found["native"].values())
    assert_same(found["native"], found["reference"])
