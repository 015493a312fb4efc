"""The argument ``out``: the new memory goes into one of the caller, which may be the old one."""

import oracle
import pytest
import torch
from oracle import EMPTY_SHAPES, SHAPES, problem

import fastkm
from fastkm import MemoryState
from fastkm._runtime import counts, schema
from fastkm.testing.operations import OPERATIONS

NATIVE_MISSING = pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
INTO = ("update_posterior", "write")
ROOMY = [(3, 1, 2, 40, 33), (2, 70, 2, 47, 64), (1, 1, 2, 130, 100), (2, 100, 2, 150, 16)]  # rows of several vectors

pytestmark = pytest.mark.parametrize("operation", INTO)


def run(operation, p, backend, **options):
    if operation == "write":
        return fastkm.write(p.state, p.values, p.noise_var, p.ridge, mask=p.mask, backend=backend, **options)
    return fastkm.update_posterior(p.state, p.weights, p.values, p.noise_var, mask=p.mask, backend=backend, **options)


def cloned(p):
    return oracle.map_tensors(p, torch.clone)


def truth_of(operation, p):
    wide = oracle.map_tensors(p, lambda x: x.double() if x.is_floating_point() else x)
    return oracle.flat(run(operation, wide, "reference"))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(32, 1, 1, 1, 1), *SHAPES[1:], *ROOMY], ids=str)
def test_an_update_in_place_is_the_update(operation, shape, masked, backend, dtype):
    p = problem(*shape, dtype, masked=masked)

    def in_place(p, backend):
        p = cloned(p)
        result = run(operation, p, backend, out=p.state)
        assert result.state.mean is p.state.mean
        assert result.state.cov is p.state.cov
        return result

    oracle.judge(in_place, p, truth_of(operation, p), backend)


@pytest.mark.parametrize("shape", [*SHAPES, *ROOMY], ids=str)
def test_another_memory_gets_the_same_bits_as_the_same_memory(operation, shape, backend, dtype):
    p = problem(*shape, dtype)
    before, other = cloned(p), MemoryState(*(torch.full_like(x, torch.nan) for x in p.state))
    apart = run(operation, p, backend, out=other)
    assert all(map(torch.equal, oracle.tensors(p), oracle.tensors(before))), "an argument changed"
    assert oracle.equal(apart, run(operation, p, backend, out=p.state))


def test_one_tensor_may_be_the_old_one_and_the_other_apart(operation, backend, dtype):
    p = problem(2, 3, 2, 33, 40, dtype)
    expected = run(operation, cloned(p), backend, out=MemoryState(*map(torch.empty_like, p.state)))
    got = run(operation, p, backend, out=MemoryState(p.state.mean, torch.empty_like(p.state.cov)))
    assert oracle.equal(got, expected)


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_nothing_is_written_into_nothing(operation, shape, backend, dtype):
    p = problem(*shape, dtype)
    expected = run(operation, p, backend)
    for got, own in zip(run(operation, cloned(p), backend, out=cloned(p).state).state, expected.state, strict=True):
        oracle.assert_close(got, own.double())


@NATIVE_MISSING
@pytest.mark.parametrize("T", [1, 3, 80])
def test_the_number_of_threads_changes_no_bit(operation, T, dtype):
    p, results = problem(1, T, 1, 330, 290, dtype), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(operation, p, "native", out=MemoryState(*map(torch.empty_like, p.state))))
    assert all(oracle.equal(results[0], other) for other in results[1:])


def test_rows_may_be_part_of_wider_ones(operation, backend, dtype):
    """The rest of the wider rows stays as it was."""
    p = problem(2, 1, 2, 37, 21, dtype)
    wide = [torch.full((2, x.shape[1] + 2, x.shape[2] + 5), 7.0, dtype=dtype) for x in p.state]
    inside = MemoryState(*(w[:, 1:-1, 2 : 2 + x.shape[2]] for w, x in zip(wide, p.state, strict=True)))
    for to, x in zip(inside, p.state, strict=True):
        to.copy_(x)
    expected = run(operation, cloned(p), backend, out=MemoryState(*map(torch.empty_like, p.state)))
    run(operation, p._replace(state=inside), backend, out=inside)
    assert oracle.equal(inside, expected.state)
    for w, x in zip(wide, inside, strict=True):
        x.fill_(7.0)
        assert (w == 7.0).all()


@pytest.mark.parametrize("where", ["in place", "apart"])
@pytest.mark.parametrize(("T", "K"), [(1, 5), (1, 40), (9, 40)])
def test_a_memory_that_is_refused_comes_out_as_it_came_in(operation, T, K, where, backend, dtype):
    p = problem(3, T, 1, K, 20, dtype)
    p.state.cov[1].fill_diagonal_(-4)
    out = p.state if where == "in place" else MemoryState(*map(torch.empty_like, p.state))
    before = cloned(p)
    with pytest.raises(torch.linalg.LinAlgError, match=r"state.cov is not positive definite in memory \[1\]"):
        run(operation, p, backend, out=out)
    good = oracle.map_tensors(before, lambda x: x[::2])
    expected = run(operation, cloned(good), backend, out=MemoryState(*map(torch.empty_like, good.state)))
    for x, old, new in zip(out, before.state, expected.state, strict=True):
        assert torch.equal(x[1], old[1])
        assert torch.equal(x[::2], new) if backend == "native" else torch.allclose(x[::2], new)


@pytest.mark.parametrize("K", [5, 40])
def test_an_asymmetric_covariance_is_found_before_anything_is_written(operation, K, backend, dtype):
    p = problem(2, 1, 1, K, 20, dtype)
    p.state.cov[1, K - 1, 0] += 1
    before = cloned(p)
    with pytest.raises(torch.linalg.LinAlgError, match=r"state.cov is not symmetric in memory \[1\]"):
        run(operation, p, backend, out=p.state)
    assert torch.equal(p.state.cov[1], before.state.cov[1])
    assert torch.equal(p.state.mean[1], before.state.mean[1])


def test_a_late_block_that_is_refused_leaves_the_blocks_before_it(operation, backend):
    """An update writes block by block; a write is whole or not at all."""
    p = problem(1, 40, 1, 30, 20)
    p.values[0, 39] = torch.nan
    p.weights[0, 39] = torch.nan
    start = cloned(p)
    with pytest.raises(torch.linalg.LinAlgError, match="not finite"):
        run(operation, p, backend, out=p.state)
    if operation == "write" or backend == "reference":
        expected = start.state
    else:
        some = start._replace(
            weights=start.weights[:, :32], values=start.values[:, :32], noise_var=start.noise_var[:, :32]
        )
        expected = run(operation, some, backend, out=start.state).state
    assert oracle.equal(p.state, expected)


# ------------------------------------------------------------------------------------------------------ what is refused


def refused(p, change):
    """An ``out`` that is not allowed, the error, and its words."""
    mean, cov = p.state
    wide = torch.zeros(2, 6, 12, dtype=mean.dtype)
    return {
        "no pair": (1, TypeError, "out must be a MemoryState"),
        "another shape": (MemoryState(mean[:, :, :5].clone(), cov), ValueError, "out.mean must have shape"),
        "another dtype": (MemoryState(mean, cov.float()), TypeError, "out.cov must be float64"),
        "another device": (MemoryState(mean.to("meta"), cov), ValueError, "out.mean must be on cpu"),
        "a gradient": (
            MemoryState(mean.clone().requires_grad_(), cov),
            RuntimeError,
            "out.mean requires a gradient and cannot be overwritten",
        ),
        "expanded": (MemoryState(mean[:1].expand(2, -1, -1), cov), ValueError, "out.mean has several entries at one"),
        "overlapping rows": (
            MemoryState(mean, torch.zeros(80, dtype=mean.dtype).as_strided((2, 6, 6), (36, 5, 1))),
            ValueError,
            "out.cov has several entries at one",
        ),
        "transposed": (MemoryState(mean, torch.zeros_like(cov).mT), ValueError, "out.cov must have contiguous rows"),
        "each other": (
            MemoryState(wide[..., :6], wide[..., 3:9]),
            ValueError,
            "out.mean shares memory with out.cov",
        ),
        "the other tensor": (
            MemoryState(cov, torch.zeros_like(cov)),
            ValueError,
            "out.mean shares memory with state.cov",
        ),
        "the values": (MemoryState(p.values, cov), ValueError, "out.mean shares memory with values"),
    }[change]


CHANGES = (
    "no pair",
    "another shape",
    "another dtype",
    "another device",
    "a gradient",
    "expanded",
    "overlapping rows",
    "transposed",
    "each other",
    "the other tensor",
    "the values",
)


@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_written_into_is_refused_in_words(operation, change, backend):
    p = problem(2, 6, 1, 6, 6)
    before = cloned(p)
    out, error, words = refused(p, change)
    with pytest.raises(error, match=words):
        run(operation, p, backend, out=out)
    assert all(map(torch.equal, oracle.tensors(p), oracle.tensors(before)))


def test_a_state_one_row_further_is_refused(operation, backend):
    """It overlaps the memory in part."""
    p = problem(1, 2, 1, 6, 6)
    room = torch.zeros(1, 7, 6, dtype=torch.float64)
    room[:, :6] = p.state.mean
    state = MemoryState(room[:, :6], p.state.cov)
    with pytest.raises(ValueError, match=r"out.mean shares memory with state.mean; it may be state.mean itself"):
        run(operation, p._replace(state=state), backend, out=MemoryState(room[:, 1:], p.state.cov))
    assert torch.equal(room[:, :6], p.state.mean)


def test_no_gradient_is_computed(operation, backend):
    p = problem(2, 3, 1, 5, 6)
    values = p.values.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"{operation} with out computes no gradient"):
        run(operation, p._replace(values=values), backend, out=p.state)
    with torch.no_grad():
        run(operation, p._replace(values=values), backend, out=p.state)


def test_autograd_notices_that_the_memory_has_changed(operation, backend):
    p = problem(2, 3, 1, 5, 6)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = (scale * p.state.mean).square().sum()
    run(operation, p, backend, out=p.state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_of_inference_mode_may_be_written_into(operation, backend):
    p = problem(2, 3, 1, 5, 6)
    expected = run(operation, p, backend, out=MemoryState(*map(torch.empty_like, p.state)))
    with torch.inference_mode():
        own = cloned(p)
        got = run(operation, own, backend, out=own.state)
    assert oracle.equal(got, expected)


def test_a_transform_is_refused_in_words(operation, backend):
    p = problem(2, 3, 1, 5, 6)
    with pytest.raises(RuntimeError, match=r"torch.func cannot transform"):
        torch.func.vmap(lambda z: run(operation, p._replace(values=z), backend, out=p.state).kl)(
            p.values.expand(3, -1, -1, -1)
        )


@NATIVE_MISSING
def test_a_compiled_update_in_place_is_the_update(operation, nothing_compiled_yet):
    p = problem(2, 3, 1, 33, 20)
    expected = run(operation, cloned(p), "native", out=MemoryState(*map(torch.empty_like, p.state)))
    compiled = torch.compile(lambda p: run(operation, p, "native", out=p.state), fullgraph=True, backend="aot_eager")
    got = compiled(p)
    assert oracle.equal(got, expected)
    assert oracle.equal(p.state, expected.state)


# -------------------------------------------------------------------------------------------------------- the operators


def operator_arguments(operation, dtype=torch.float64):
    p = problem(2, 3, 2, 33, 20, dtype, masked=True)
    given = OPERATIONS[operation].operator.arguments(oracle.as_operands(p))
    return (*given, *(torch.zeros_like(x) for x in p.state))


@NATIVE_MISSING
def test_opcheck(operation, dtype):
    operator = getattr(torch.ops.fastkm, f"{operation}_into").default
    assert [a.name for a in operator._schema.arguments if a.alias_info] == ["out_mean", "out_cov"]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, operator_arguments(operation, dtype), test_utils=checks)


def test_the_count_is_that_of_the_operation(operation):
    assert getattr(counts, f"{operation}_into") is getattr(counts, operation)
