"""Addressing in two steps: what a memory needs is computed once, then queries come."""

import io

import oracle
import pytest
import torch
from oracle import EMPTY_SHAPES, SHAPES, assert_close, batched, problem
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import fastkm
from fastkm import AddressingFactor, factor_addressing, read, read_factored, solve_factored
from fastkm._runtime import schema
from fastkm.reading.reference import read_literal

NATIVE_MISSING = pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
METHODS = ("ridge", "deepmind")
methods = pytest.mark.parametrize("method", METHODS)


def in_two_steps(p, backend, *, method="ridge", made_by=None, **options):
    factor = factor_addressing(p.state.mean, p.ridge, method=method, backend=made_by or backend)
    return read_factored(factor, p.queries, backend=backend, **options)


@NATIVE_MISSING
@pytest.mark.parametrize("num_iters", [1, 3])
@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1e2, 1e5])
@pytest.mark.parametrize(("K", "C"), [(8, 12), (40, 17), (40, 60), (160, 40), (160, 200)])
def test_codes_that_are_nearly_equal_keep_the_digits_of_the_literal_loop(K, C, ridge, num_iters):
    """Four times the error of the literal loop in float32 is the bound that every kernel keeps."""
    mean, queries = torch.randn(3, 1, C) + 1e-2 * torch.randn(3, K, C), torch.randn(3, 9, C)
    ridges = torch.full((3,), ridge)
    exact = read_literal(mean.double(), queries.double(), ridges.double(), num_iters, False)
    literal = read_literal(mean, queries, ridges, num_iters, False)
    factor = factor_addressing(mean, ridges, backend="native")
    got = read_factored(factor, queries, num_iters=num_iters, backend="native")
    # Every product has sums of up to max(K, C) terms, each rounded; errors of their signs add up like a random walk.
    rounding = torch.finfo(torch.float32).eps * max(K, C) ** 0.5
    norm = lambda x: torch.linalg.matrix_norm(x, 2).max()  # noqa: E731
    weights = norm(factor.pseudoinverse) * queries.norm(dim=-1).max()
    for ours, theirs, truth, largest in zip(got, literal, exact, (norm(mean) * weights, weights), strict=False):
        assert oracle.error(ours, truth) <= 4 * oracle.error(theirs, truth) + rounding * largest


@NATIVE_MISSING
@pytest.mark.parametrize(("K", "C"), [(8, 12), (40, 17), (40, 60), (160, 40), (160, 200)])
def test_iterations_keep_their_digits_where_the_ridge_dominates(K, C):
    """w − λ A⁻¹ w is a small difference there; a third address is a millionth of the first."""
    mean, queries, ridges = torch.randn(3, K, C), torch.randn(3, 9, C), torch.full((3,), 1e5)
    exact = read_literal(mean.double(), queries.double(), ridges.double(), 3, False)
    got = read_factored(factor_addressing(mean, ridges, backend="native"), queries, num_iters=3, backend="native")
    rounding = torch.finfo(torch.float32).eps * max(K, C) ** 0.5
    for ours, truth in zip(got, exact, strict=False):
        assert oracle.error(ours, truth) <= 6 * rounding * oracle.largest(
            truth
        )  # products: three addresses, three reads


# ---------------------------------------------------------------------------------------------------------- the factor


@methods
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_parts_of_a_factor(shape, method, backend):
    p = problem(*shape)
    mean, factor = p.state.mean, factor_addressing(p.state.mean, p.ridge, method=method, backend=backend)
    gram = mean @ mean.mT
    eye = torch.eye(mean.shape[1], dtype=mean.dtype)
    system = (gram @ gram if method == "deepmind" else gram) + p.ridge.view(-1, 1, 1) * eye
    assert_close(factor.lower @ factor.lower.mT, system, "lower")
    assert torch.equal(factor.lower, factor.lower.tril())
    codes = torch.eye(mean.shape[2], dtype=mean.dtype).expand(len(mean), -1, -1)
    assert_close(factor.pseudoinverse, fastkm.solve_addressing(mean, codes, p.ridge, method=method), "pseudoinverse")
    assert_close(factor.gram, gram if method == "deepmind" else gram[:, :0], "gram")
    assert torch.equal(factor.mean, mean)
    assert torch.equal(factor.ridge, p.ridge)


@pytest.mark.parametrize("ridge", [0.7, torch.tensor(0.7), torch.tensor([0.7, 0.7])], ids=["float", "0-d", "[B]"])
def test_a_factor_has_a_ridge_for_each_memory(ridge, backend):
    factor = factor_addressing(torch.randn(2, 3, 4), ridge, backend=backend)
    assert torch.equal(factor.ridge, torch.full((2,), 0.7))


def test_a_changed_memory_changes_no_factor(backend):
    """Neither what it holds nor what is read with it."""
    p = problem(2, 1, 3, 4, 5)
    mean, ridge = p.state.mean.clone(), p.ridge.clone()
    factor = factor_addressing(mean, ridge, backend=backend)
    before = read_factored(factor, p.queries, num_iters=2, backend=backend)
    mean.zero_(), ridge.fill_(9)
    assert oracle.equal(read_factored(factor, p.queries, num_iters=2, backend=backend), before)


def test_a_memory_that_is_not_positive_definite_is_named(backend):
    mean = torch.ones(3, 40, 2)
    mean[0], mean[2] = torch.randn(40, 2), torch.randn(40, 2) * 1e-3
    with pytest.raises(torch.linalg.LinAlgError, match=r"mean meanᵀ \+ ridge I is not positive definite in memor.*1"):
        factor_addressing(mean * 1e6, 1e-3, backend=backend)


# ------------------------------------------------------------------------------------------------------------- reading


@methods
@pytest.mark.parametrize("num_iters", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_factored_read_is_the_read(shape, num_iters, method, backend, dtype):
    p, options = problem(*shape, dtype), {"num_iters": num_iters}
    exact = batched(oracle.read, p.state.mean, p.queries, p.ridge, squared=method == "deepmind", **options)
    oracle.judge(lambda p, b: in_two_steps(p, b, method=method, **options), p, exact, backend)


@pytest.mark.parametrize("num_iters", [1, 4])
@pytest.mark.parametrize(("K", "C"), [(5, 40), (40, 5), (16, 16), (17, 33), (50, 31)])
def test_more_queries_than_columns(K, C, num_iters, backend, dtype):
    """The native kernel then iterates the pseudo-inverse in place of the queries."""
    p = problem(2, 0, 70, K, C, dtype)
    exact = batched(oracle.read, p.state.mean, p.queries, p.ridge, num_iters=num_iters)
    oracle.judge(lambda p, b: in_two_steps(p, b, num_iters=num_iters), p, exact, backend)


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 0, 3, 17, 33), (1, 0, 90, 20, 16)], ids=str)
def test_parts_of_any_layout(shape, layout, backend, dtype):
    p = problem(*shape, dtype)
    factor = factor_addressing(p.state.mean, p.ridge, backend=backend)
    hostile = AddressingFactor(*(oracle.poisoned(x, layout) for x in factor))
    for options in ({}, {"num_iters": 2}):
        got = read_factored(hostile, oracle.poisoned(p.queries, layout), backend=backend, **options)
        for x, expected in zip(got, read_factored(factor, p.queries, backend=backend, **options), strict=True):
            assert_close(x, expected.double())


def test_a_solve_is_the_weights_of_a_read(backend, dtype):
    p = problem(3, 0, 5, 8, 6, dtype)
    factor = factor_addressing(p.state.mean, p.ridge, backend=backend)
    got, expected = solve_factored(factor, p.queries, backend=backend), read_factored(factor, p.queries).weights
    assert_close(got, expected.double())


@NATIVE_MISSING
@pytest.mark.parametrize(("K", "C"), [(5, 9), (16, 16), (33, 100), (300, 270)])
def test_a_query_is_answered_as_if_it_came_alone(K, C, dtype):
    """Bit for bit, whether few rows are computed or tiles of many."""
    p = problem(2, 0, 530, K, C, dtype)
    factor = factor_addressing(p.state.mean, p.ridge)
    whole = read_factored(factor, p.queries)
    for count in (1, 2, 3, 4, 5, 8, 13, 64, 70):
        part = read_factored(factor, p.queries[:, 7 : 7 + count])
        assert torch.equal(part.values, whole.values[:, 7 : 7 + count]), count
        assert torch.equal(part.weights, whole.weights[:, 7 : 7 + count]), count


@NATIVE_MISSING
@pytest.mark.parametrize("Q", [1, 3, 5, 150, 600])
@pytest.mark.parametrize(("K", "C"), [(9, 7), (300, 333), (530, 64)])
@methods
def test_threads_change_no_bit(K, C, Q, method, dtype):
    p = problem(1, 0, Q, K, C, dtype)
    one = factor_addressing(p.state.mean, p.ridge, method=method)
    answers = [read_factored(one, p.queries, num_iters=n) for n in (1, 2)]
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert oracle.equal(factor_addressing(p.state.mean, p.ridge, method=method), one)
        for n, answer in zip((1, 2), answers, strict=True):
            assert oracle.equal(read_factored(one, p.queries, num_iters=n), answer)


def hard_problems(seed):
    """Memories whose Gram matrix float32 just holds: near-duplicate rows, smooth rows, and more rows than columns."""
    generator = torch.Generator().manual_seed(seed)
    K, C = ((64, 32), (128, 200), (96, 100))[seed % 3]
    mean = torch.randn(2, K, C, generator=generator)
    if seed % 2:
        mean = mean[:, torch.arange(K) // 2] + 3e-2 * torch.randn(2, K, C, generator=generator)
    else:
        mean = mean.cumsum(1) / K**0.5
    return mean, mean.mT @ torch.randn(2, K, 4, generator=generator)


@pytest.mark.parametrize("seed", range(6))
def test_the_pseudo_inverse_keeps_the_digits_of_a_solve(seed, backend):
    """Queries that the memory holds, so that small weights are left of large terms."""
    mean, queries = hard_problems(seed)
    queries, ridge = queries.mT.contiguous(), 1e-2
    exact = read(mean.double(), queries.double(), ridge, backend="reference").weights
    solved = oracle.error(read(mean, queries, ridge, backend=backend).weights, exact)
    factor = factor_addressing(mean, ridge, backend=backend)
    got = oracle.error(read_factored(factor, queries, backend=backend).weights, exact)
    assert got <= 2 * (solved + torch.finfo(torch.float32).eps * oracle.largest(exact))


# ----------------------------------------------------------------------------------------------------------- gradients


@methods
@pytest.mark.parametrize("num_iters", [1, 3])
@pytest.mark.parametrize("made_by", ["reference", pytest.param("native", marks=NATIVE_MISSING)])
def test_gradients_are_those_of_a_read(num_iters, made_by, method, backend):
    p = problem(2, 0, 3, 5, 7)
    leaves = [x.clone().requires_grad_() for x in (p.state.mean, p.queries, p.ridge)]
    given = p._replace(state=p.state._replace(mean=leaves[0]), queries=leaves[1], ridge=leaves[2])
    options = {"num_iters": num_iters, "method": method}
    results = (
        in_two_steps(given, backend, made_by=made_by, **options),
        read(leaves[0], leaves[1], leaves[2], backend="reference", **options),
    )
    cotangents = [torch.randn_like(x) for x in results[0]]
    got, expected = (torch.autograd.grad(result, leaves, cotangents) for result in results)
    for x, y in zip(got, expected, strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("num_iters", [1, 3])
@pytest.mark.parametrize("shape", [(2, 0, 1, 20, 9), (1, 0, 4, 50, 60)], ids=str)
def test_gradients_of_few_queries(shape, num_iters, backend):
    """The native kernel never forms the cotangent of the Gram matrix then."""
    p = problem(*shape)
    given = (p.state.mean, p.queries, p.ridge)

    def gradients(function, name):
        leaves = [x.clone().requires_grad_() for x in given]
        result = function(leaves, name)
        cotangents = [torch.linspace(1, 2, x.numel(), dtype=x.dtype).view(x.shape) for x in result]
        return torch.autograd.grad(tuple(result), leaves, cotangents)

    def in_one(leaves, name):
        return read(*leaves, num_iters=num_iters, backend=name)

    def in_two(leaves, name):
        factor = factor_addressing(leaves[0], leaves[2], backend=name)
        return read_factored(factor, leaves[1], num_iters=num_iters, backend=name)

    expected = gradients(in_one, "reference")
    for function in (in_one, in_two):
        for x, y in zip(gradients(function, backend), expected, strict=True):
            assert_close(x, y)


@methods
def test_gradients_of_a_solve(method, backend):
    p = problem(1, 0, 2, 3, 4)
    leaves = [x.clone().requires_grad_() for x in (p.state.mean, p.queries, p.ridge)]

    def weights(mean, queries, ridge):
        return solve_factored(factor_addressing(mean, ridge, method=method, backend=backend), queries, backend=backend)

    assert torch.autograd.gradcheck(weights, leaves)
    assert torch.autograd.gradgradcheck(weights, leaves)


def test_second_derivatives(backend):
    p = problem(1, 0, 2, 3, 4)
    leaves = [x.clone().requires_grad_() for x in (p.state.mean, p.queries, p.ridge)]

    def values(mean, queries, ridge):
        return read_factored(factor_addressing(mean, ridge, backend=backend), queries, num_iters=2, backend=backend)[0]

    assert torch.autograd.gradgradcheck(values, leaves)


def test_gradients_reach_what_the_factor_was_made_of(backend):
    """Through its copies. A factor that was made without gradients passes none on."""
    p = problem(2, 0, 3, 4, 5)
    mean, queries = p.state.mean.clone().requires_grad_(), p.queries.clone().requires_grad_()
    factor = factor_addressing(mean, p.ridge, backend=backend)
    assert factor.mean.requires_grad
    assert not any(x.requires_grad for x in factor[1:])
    with torch.no_grad():
        constant = factor_addressing(mean, p.ridge, backend=backend)
    read_factored(constant, queries, backend=backend).values.sum().backward()
    assert mean.grad is None
    alone = queries.grad.clone()
    queries.grad = None
    read_factored(factor, queries, backend=backend).values.sum().backward()
    assert mean.grad.abs().max() > 0
    assert_close(queries.grad, alone)


# ------------------------------------------------------------------------------------------------- around the functions


def test_a_factor_is_saved_and_loaded(backend):
    p, file = problem(2, 0, 3, 4, 5), io.BytesIO()
    factor = factor_addressing(p.state.mean, p.ridge, method="deepmind", backend=backend)
    torch.save(factor, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded) is AddressingFactor
    assert oracle.equal(
        read_factored(loaded, p.queries, backend=backend), read_factored(factor, p.queries, backend=backend)
    )


class TwoSteps(torch.nn.Module):
    def __init__(self, backend, method):
        super().__init__()
        self.backend, self.method = backend, method

    def forward(self, mean, queries, ridge):
        factor = factor_addressing(mean, ridge, method=self.method, backend=self.backend)
        return factor, *read_factored(factor, queries, num_iters=2, backend=self.backend)


@methods
def test_both_steps_are_one_graph(method, backend, nothing_compiled_yet):
    p = problem(2, 0, 3, 4, 5)
    module, inputs = TwoSteps(backend, method), (p.state.mean, p.queries, p.ridge)
    expected = tree_leaves(module(*inputs))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for got in (compiled(*inputs), torch.export.export(module, inputs).module()(*inputs)):
        for x, y in zip(tree_leaves(got), expected, strict=True):
            assert_close(x, y)


@NATIVE_MISSING
def test_the_gradient_of_both_steps_in_one_graph(nothing_compiled_yet):
    p = problem(2, 0, 3, 4, 5)
    leaves = [x.clone().requires_grad_() for x in (p.state.mean, p.queries, p.ridge)]
    module = TwoSteps("native", "ridge")

    def gradients(function):
        return torch.autograd.grad(function(*leaves)[-2].square().sum(), leaves)

    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for x, y in zip(gradients(compiled), gradients(module), strict=True):
        assert_close(x, y)


@methods
def test_vmap_is_the_loop(method, backend):
    p = problem(6, 0, 3, 4, 5)
    module, inputs = TwoSteps(backend, method), (p.state.mean, p.queries, p.ridge)
    expected = tree_leaves(module(*inputs))
    mapped = torch.vmap(module)(*(x.unflatten(0, (3, 2)) for x in inputs))
    for x, y in zip(tree_leaves(mapped), expected, strict=True):
        assert_close(x.flatten(0, 1), y)


def test_gradients_under_torch_func(backend):
    p = problem(2, 0, 3, 4, 5)
    module, inputs = TwoSteps(backend, "ridge"), (p.state.mean, p.queries, p.ridge)

    def loss(*inputs):
        return module(*inputs)[1].square().sum()

    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for x, y in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*inputs), expected, strict=True):
        assert_close(x, y)


def test_fake_tensors_have_the_shapes(backend):
    p = problem(2, 0, 3, 4, 5, torch.float32)
    module, inputs = TwoSteps(backend, "ridge"), (p.state.mean, p.queries, p.ridge)
    real = tree_leaves(module(*inputs))
    with FakeTensorMode() as mode:
        fake = tree_leaves(module(*tree_map(mode.from_tensor, inputs)))
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
@methods
def test_empty_axes(shape, method, backend, dtype):
    B, _, Q, K, C = shape
    result = in_two_steps(problem(*shape, dtype), backend, method=method, num_iters=2)
    assert (result.values.shape, result.weights.shape) == ((B, Q, C), (B, Q, K))
    assert oracle.largest(result.values) == 0 or 0 not in (K, C)


# ----------------------------------------------------------------------------------------------------------- bad input


def changed(factor, **fields):
    return factor._replace(**fields)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda f, q: (f, q[..., :-1]), ValueError, r"queries must have shape .* = \[2, 3, 5\], got \[2, 3, 4\]"),
        (lambda f, q: (f, q[:1]), ValueError, r"queries must have shape"),
        (lambda f, q: (f, q[0]), ValueError, r"queries must have shape"),
        (lambda f, q: (f, q.double()), TypeError, "queries must be float32 like factor.mean, got float64"),
        (lambda f, q: (f, q.to("meta")), ValueError, "queries must be on cpu like factor.mean, got meta"),
        (lambda f, q: (f.mean, q), TypeError, "factor must be an AddressingFactor.*got Tensor"),
        (lambda f, q: (f[:4], q), TypeError, "factor must be an AddressingFactor.*got tuple"),
        (lambda f, q: (changed(f, mean=f.mean[:, :-1]), q), ValueError, r"factor.lower must have shape \[B, K, K\]"),
        (lambda f, q: (changed(f, lower=f.lower.double()), q), TypeError, "factor.lower must be float32"),
        (lambda f, q: (changed(f, pseudoinverse=f.pseudoinverse.mT), q), ValueError, "factor.pseudoinverse must have"),
        (lambda f, q: (changed(f, gram=f.lower[:, :2]), q), ValueError, "factor.gram must have shape"),
        (lambda f, q: (changed(f, gram=None), q), TypeError, "factor.gram must be a tensor"),
        (lambda f, q: (changed(f, ridge=-f.ridge), q), ValueError, "factor.ridge must be positive and finite"),
        (lambda f, q: (changed(f, ridge=f.ridge[:1]), q), ValueError, "factor.ridge must be a float or a tensor"),
    ],
)  # fmt: skip
def test_a_factor_of_something_else_is_refused_in_words(change, kind, words, backend):
    factor = factor_addressing(torch.randn(2, 4, 5), 1.0, backend=backend)
    for function in (read_factored, solve_factored):
        with pytest.raises(kind, match=words):
            function(*change(factor, torch.randn(2, 3, 5)), backend=backend)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"ridge": 0.0}, ValueError, "ridge must be positive"),
        ({"ridge": torch.ones(3)}, ValueError, "ridge must be a float or a tensor"),
        ({"mean": torch.ones(4, 5)}, ValueError, r"mean must have shape \[B, K, C\]"),
        ({"mean": torch.ones(2, 4, 5).half()}, TypeError, "mean must be float32 or float64"),
        ({"method": "woodbury"}, ValueError, "method must be one of 'ridge', 'deepmind'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
    ids=str,
)
def test_bad_arguments_of_a_factor(options, kind, words):
    with pytest.raises(kind, match=words):
        factor_addressing(**{"mean": torch.ones(2, 4, 5), "ridge": 1.0, **options})


# ------------------------------------------------------------------------------------------------------- low precision

LOW = [torch.bfloat16, torch.float16]
low_precision = pytest.mark.parametrize("low", LOW, ids=str)
READS = {
    "read": lambda mean, queries, **options: read(mean, queries, 0.5, **options),
    "read_factored": lambda mean, queries, **options: read_factored(factor_addressing(mean, 0.5), queries, **options),
}
reads = pytest.mark.parametrize("name", READS)


@NATIVE_MISSING
@low_precision
@reads
@pytest.mark.parametrize(("K", "C", "Q"), [(3, 5, 2), (20, 33, 1), (20, 33, 7), (20, 33, 130), (16, 40, 300)])
def test_low_precision_queries_are_widened_tile_by_tile(K, C, Q, name, low):
    """As if they had been converted before, for tiles of every kind and rows of any stride."""
    mean, queries = torch.randn(2, K, C), torch.randn(2, Q, C).to(low)
    expected = READS[name](mean, queries.float())
    for given in (queries, oracle.poisoned(queries, "strided"), oracle.poisoned(queries, "transposed")):
        assert oracle.equal(READS[name](mean, given), expected)


@NATIVE_MISSING
@low_precision
def test_every_code_of_16_bits_is_widened_exactly(low):
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(low).view(1, -1, 1)
    mean, finite = torch.ones(1, 1, 1), codes.float().isfinite()
    got, expected = (read(mean, x, 1.0).values for x in (codes, codes.float()))
    assert torch.equal(got[finite], expected[finite])
    assert torch.equal(got.isnan(), expected.isnan())


@NATIVE_MISSING
@low_precision
@reads
def test_values_are_rounded_once_to_the_dtype_asked_for(name, low):
    """Over all magnitudes, ties and what is too large among them."""
    mean = torch.eye(16).unsqueeze(0)
    exponents = torch.randint(-42, 20, (1, 4096, 16)).float()
    queries = torch.randn(1, 4096, 16) * exponents.exp2()
    halfway = torch.tensor([1.5 + 3 * 2.0**-9, 1.5 + 3 * 2.0**-12, 1.5 + 2.0**-9, 1.5 + 2.0**-12, 3e38, 1e5, -1e5, 0.0])
    queries[0, :8, 3] = halfway
    wide = READS[name](mean, queries, num_iters=1)
    got = READS[name](mean, queries, out_dtype=low)
    assert (got.values.dtype, got.weights.dtype) == (low, torch.float32)
    assert torch.equal(got.values, wide.values.to(low))
    assert torch.equal(got.weights, wide.weights)


@low_precision
@reads
def test_the_dtype_of_values_on_every_backend(name, low, backend):
    p = problem(2, 0, 5, 4, 6, torch.float32)
    wide = READS[name](p.state.mean, p.queries, backend=backend)
    for out_dtype in (None, torch.float32):
        assert oracle.equal(READS[name](p.state.mean, p.queries, out_dtype=out_dtype, backend=backend), wide)
    got = READS[name](p.state.mean, p.queries.to(low), out_dtype=low, backend=backend)
    assert got.values.dtype == low


@reads
def test_the_gradient_of_low_precision_values(name, backend):
    """Rounding counts as the identity."""
    p = problem(2, 0, 5, 4, 6, torch.float32)
    gradients = []
    for out_dtype in (None, torch.bfloat16):
        mean, queries = p.state.mean.clone().requires_grad_(), p.queries.clone().requires_grad_()
        READS[name](mean, queries, out_dtype=out_dtype, backend=backend).values.sum().backward()
        gradients.append((mean.grad, queries.grad))
    for x, y in zip(*gradients, strict=True):
        assert_close(x, y.double())


@reads
@pytest.mark.parametrize(
    ("dtype", "out_dtype", "words"),
    [
        (torch.float32, torch.float64, "out_dtype must be None or float32, bfloat16 or float16, got float64"),
        (torch.float64, torch.bfloat16, "out_dtype must be None or float64, got bfloat16"),
        (torch.float32, torch.int8, "got int8"),
        (torch.float32, "bfloat16", "got str"),
    ],
)
def test_other_dtypes_of_values_are_refused(name, dtype, out_dtype, words, backend):
    p = problem(2, 0, 5, 4, 6, dtype)
    with pytest.raises(TypeError, match=words):
        READS[name](p.state.mean, p.queries, out_dtype=out_dtype, backend=backend)
