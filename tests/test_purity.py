"""Every operation on every backend is a function of values: of nothing but them, and changing none of them."""

import oracle
import pytest
import torch
from oracle import EMPTY_SHAPES, LAYOUTS, SHAPES, call, map_tensors, poisoned, problem, tensors

from fastkm._runtime import schema

THREADED = ("solve_addressing", "factor_addressing", "update_posterior", "write", "read", "read_factored", "kl_memory")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_in_memory_changes_nothing(layout, operation, backend, dtype):
    p = problem(3, 7, 5, 11, 6, dtype, masked=True)
    hostile = map_tensors(p, lambda x: poisoned(x, layout))
    expected, got = oracle.flat(call(operation, p, backend)), oracle.flat(call(operation, hostile, backend))
    for name, x in got.items():
        if x.is_floating_point():
            oracle.assert_close(x, expected[name].double(), name)


def test_expanded_arguments_are_plain_values(operation, backend, dtype):
    """One memory seen as a batch of four through a stride of 0, as a learned prior is."""
    one = problem(1, 7, 5, 11, 6, dtype, masked=True)
    expanded = map_tensors(one, lambda x: x.expand(4, *x.shape[1:]))
    copied = map_tensors(expanded, torch.Tensor.contiguous)
    expected, got = oracle.flat(call(operation, copied, backend)), oracle.flat(call(operation, expanded, backend))
    for name, x in got.items():
        if x.is_floating_point():
            oracle.assert_close(x, expected[name].double(), name)


@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
def test_arguments_stay_as_they_are(layout, operation, backend, dtype):
    p = problem(3, 7, 5, 11, 6, dtype, masked=True)
    if layout != "contiguous":
        p = map_tensors(p, lambda x: poisoned(x, layout))
    storages = [torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()) for x in tensors(p)]
    before = [storage.clone() for storage in storages]
    call(operation, p, backend)
    assert all(map(torch.equal, storages, before))


@pytest.mark.parametrize("shape", [(2, 7, 5, 11, 6), (1, 1, 1, 1, 1), (2, 0, 4, 3, 5)], ids=str)
def test_results_share_no_memory(shape, operation, backend):
    p = problem(*shape)
    got = [x for x in oracle.flat(call(operation, p, backend)).values() if x.numel()]
    addresses = [x.untyped_storage().data_ptr() for x in got]
    assert len(set(addresses)) == len(addresses), "two results share storage"
    assert not set(addresses) & {x.untyped_storage().data_ptr() for x in tensors(p)}, "a result is an argument"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_call_gives_the_same_bits(shape, operation, backend, dtype):
    p = problem(*shape, dtype, masked=True)
    first = call(operation, p, backend)
    torch.full((100_000,), torch.nan)  # what freed memory may hold when the next call takes it
    assert oracle.equal(first, call(operation, p, backend))


def test_a_memory_alone_is_the_memory_in_the_batch(operation, backend, dtype):
    p = problem(5, 9, 4, 13, 7, dtype, masked=True)
    whole = oracle.flat(call(operation, p, backend))
    for b in range(5):
        alone = oracle.flat(call(operation, map_tensors(p, lambda x, b=b: x[b : b + 1]), backend))
        for name, x in alone.items():
            if backend == "native" or not x.is_floating_point():
                assert torch.equal(x, whole[name][b : b + 1]), f"{name} of memory {b}"
            else:
                oracle.assert_close(x, whole[name][b : b + 1].double(), name)


def test_memories_do_not_touch_one_another(operation, backend, dtype):
    """With NaN in the patterns of one memory the others are what they were, or the call names that memory alone."""
    p = problem(4, 5, 5, 6, 7, dtype)
    clean = oracle.flat(call(operation, p, backend))
    sick = map_tensors(p, torch.clone)
    sick.values[2], sick.queries[2] = torch.nan, torch.nan
    if operation == "write":  # weights that are not numbers leave no covariance to continue with
        with pytest.raises(torch.linalg.LinAlgError, match=r"memory \[2\]$"):
            call(operation, sick, backend)
        return
    got = oracle.flat(call(operation, sick, backend))
    for name, x in got.items():
        for b in (0, 1, 3):
            if x.is_floating_point():
                oracle.assert_close(x[b], clean[name][b].double(), f"{name} of memory {b}")


@pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
@pytest.mark.parametrize("operation", THREADED)
def test_the_number_of_threads_changes_no_bit(operation, dtype):
    p = problem(7, 20, 9, 33, 17, dtype, masked=True)
    one = call(operation, p, "native")
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert oracle.equal(one, call(operation, p, "native")), f"{threads} threads"


@pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
@pytest.mark.parametrize("options", [{}, {"method": "deepmind"}], ids=str)
@pytest.mark.parametrize("operation", ["solve_addressing", "read"])
def test_threads_share_a_memory_of_many_queries(operation, options, dtype):
    """Fewer memories than threads: each takes some tiles of queries, and one thread's may be of two memories."""
    p = problem(2, 1, 150, 9, 7, dtype)
    one = call(operation, p, "native", **options)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert oracle.equal(one, call(operation, p, "native", **options)), f"{threads} threads"


# Above the sizes from which threads share the work inside a memory: columns, rows, triangles and copies. B, T, Q, K, C.
SHARED_SHAPES = [(1, 70, 40, 300, 333), (2, 33, 5, 257, 90), (1, 40, 70, 530, 64)]


@pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
@pytest.mark.parametrize("shape", SHARED_SHAPES, ids=str)
@pytest.mark.parametrize("operation", THREADED)
def test_threads_share_one_large_memory(operation, shape, dtype):
    """Rows and columns, never a sum: the bits are those of one thread. And they are right."""
    p = problem(*shape, dtype, masked=True)
    one = call(operation, p, "native")
    for threads in (3, 4):
        torch.set_num_threads(threads)
        assert oracle.equal(one, call(operation, p, "native")), f"{threads} threads"
    if dtype == torch.float64:
        expected = oracle.flat(call(operation, p, "reference"))
        for name, x in oracle.flat(one).items():
            oracle.assert_close(x, expected[name], name)


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_nothing_is_left_unset_when_an_axis_is_empty(shape, operation, backend, dtype):
    p = problem(*shape, dtype)
    torch.full((1000,), torch.nan, dtype=dtype)
    for name, x in oracle.flat(call(operation, p, backend)).items():
        assert x.isfinite().all(), name


def test_result_has_the_dtype_of_the_arguments(operation, backend, dtype):
    for name, x in oracle.flat(call(operation, problem(2, 3, 4, 5, 6, dtype), backend)).items():
        assert x.dtype == (torch.int64 if name == "num_iters" else dtype), name
