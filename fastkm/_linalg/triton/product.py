"""Matrix products, destination first.

``precision`` is how products of float32 are rounded: "ieee", "tf32x3" or "tf32". Triton's own default would be "tf32".
"""

import triton
import triton.language as tl

from fastkm._linalg.triton.tiles import BLOCK, load_tile, store_tile

# What one thread holds of a row of A and of a column of B at a time.
STEP = tl.constexpr(16)
# Triton 3.6 takes no plain string as the default of a device function.
IEEE = tl.constexpr("ieee")


@triton.jit
def product_tile(a, b, o_m, o_n, first, end, precision: tl.constexpr = IEEE):
    """Rows ``o_m`` and columns ``o_n`` of A B, summed over [first, end).

    ``end`` is where A ends, or a multiple of STEP after ``first``.
    """
    total = tl.zeros((o_m.shape[0], o_n.shape[0]), tl.float32)
    for k in range(first, end, STEP):
        o_k = k + tl.arange(0, STEP)
        total = tl.dot(load_tile(a, o_m, o_k), load_tile(b, o_k, o_n), total, input_precision=precision)
    return total


@triton.jit
def product(
    out, a, b, scale=1.0, accumulate: tl.constexpr = False, precision: tl.constexpr = IEEE, ROWS: tl.constexpr = BLOCK
):  # fmt: skip
    """out = scale A B, or with ``accumulate`` out += scale A B, tile by tile. Ends with a barrier.

    A [m, k], B [k, n], out [m, n]; ``out`` overlaps neither. A tile has ROWS rows; with more of them B is read less
    often.
    """
    for i_m in range(0, out.rows, ROWS):
        o_m = i_m + tl.arange(0, ROWS)
        for i_n in range(0, out.columns, BLOCK):
            o_n = i_n + tl.arange(0, BLOCK)
            total = product_tile(a, b, o_m, o_n, 0, a.columns, precision) * scale
            if accumulate:
                total += load_tile(out, o_m, o_n)
            store_tile(out, total, o_m, o_n)
    tl.debug_barrier()


@triton.jit
def dot(x, y):
    """Sum of the products of the entries of two matrices, in float64."""
    total = tl.full((), 0, tl.float64)
    for i in range(0, x.rows, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for j in range(0, x.columns, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            total += tl.sum(tl.sum(load_tile(x, o_i, o_j) * load_tile(y, o_i, o_j), 1).to(tl.float64), 0)
    return total
