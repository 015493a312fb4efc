"""The parts of a workspace lie one behind the other and fill it, whatever the sizes of a memory are."""

import pytest

pytest.importorskip("triton")

from fastkm._linalg.triton import condition_backward, ridge, ridge_backward, ridge_factored
from fastkm._linalg.triton.launch import evaluate_layout, row_stride
from fastkm._linalg.triton.tiles import Matrix
from fastkm.filtering.triton import chunk, chunk_backward
from fastkm.matrix_normal import triton as matrix_normal
from fastkm.writing.triton import forward, tape

K, C, T, BLOCKS, ITERS = 40, 70, 17, 2, 3
LD = row_stride(K)
LAYOUTS = [
    (condition_backward.update_backward_layout, (T, K, C, row_stride(T))),
    (ridge.factor_layout, (K, LD, True)),
    (ridge.factor_layout, (K, LD, False)),
    (ridge.scratch_layout, (32, K, LD)),
    (ridge_factored.read_factored_layout, (BLOCKS, K, LD)),
    (ridge_backward.read_backward_layout, (K, LD, ITERS)),
    (chunk.chunk_layout, (K, C, 32)),
    (chunk_backward.filter_backward_layout, (K, C, 5, 32)),
    (matrix_normal.logdet_layout, (K, LD)),
    (matrix_normal.kl_memory_layout, (K, LD)),
    (matrix_normal.kl_memory_backward_layout, (K, C, LD)),
    (forward.write_layout, (K, C, T, LD, True)),
    (forward.write_layout, (K, C, T, LD, False)),
    (tape.search_backward_layout, (K, C, T, LD, ITERS)),
]


def matrices_of(parts) -> set[tuple[int, int, int, int]]:
    """Start, rows, columns and row stride of every part, without those that stand for another part."""
    if isinstance(parts, Matrix):
        start, rows, columns, stride, step = (int(getattr(x, "value", x)) for x in parts)
        assert step == 1
        return {(start, rows, columns, stride)}
    return set().union(*map(matrices_of, parts)) if isinstance(parts, tuple) else set()


@pytest.mark.parametrize(("layout", "sizes"), LAYOUTS, ids=lambda x: x.fn.__name__ if hasattr(x, "fn") else str(x))
def test_parts_fill_a_workspace_without_overlap(layout, sizes):
    parts = evaluate_layout(layout, *sizes)
    end = 0
    for start, rows, columns, stride in sorted(matrices_of(parts)):
        assert start == end
        assert columns <= stride
        end = start + rows * stride
    assert end == int(getattr(parts.end, "value", parts.end))
