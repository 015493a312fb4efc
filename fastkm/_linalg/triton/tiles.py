"""Matrices as small aggregates, and the tiles of them that a program holds in registers.

Kernel arguments are ``Matrices`` and ``Vectors``: a pointer and strides, one of them between memories. Device functions
take a ``Matrix`` or a ``Vector`` of one memory. All are named tuples, which Triton passes as their fields. Triton's own
tuples have attributes ``values`` and ``type``, so no field is called that.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# A matrix in a workspace is factored and multiplied in square blocks of this size: 8 numbers of each a thread with four
# warps, which leaves registers for both operands of a product.
BLOCK = tl.constexpr(32)


class Matrices(NamedTuple):
    """One matrix for each memory, as the caller has them."""

    p: Any
    s_b: Any
    s_row: Any
    s_col: Any


class Vectors(NamedTuple):
    """One vector for each memory, as the caller has them."""

    p: Any
    s_b: Any
    s: Any


class Numbers(NamedTuple):
    """One number, or one workspace, for each memory."""

    p: Any
    s_b: Any


class Matrix(NamedTuple):
    """A matrix [rows, columns]."""

    p: Any
    rows: Any
    columns: Any
    s_row: Any
    s_col: Any


class Vector(NamedTuple):
    """A vector of ``size`` numbers."""

    p: Any
    size: Any
    s: Any


# --------------------------------------------------------------------------------------------------------------- views


@triton.jit
def assume_fours(x, ALIGNED: tl.constexpr):
    """Tell the compiler that a size or stride is a multiple of four, as ``launch.rows_aligned`` found."""
    if ALIGNED:
        return x // 4 * 4
    else:
        return x


@triton.jit
def assume_aligned(x, ALIGNED: tl.constexpr):
    """Tell the compiler that every row of ``x`` starts at a multiple of 16 bytes."""
    return Matrices(x.p, assume_fours(x.s_b, ALIGNED), assume_fours(x.s_row, ALIGNED), x.s_col)


@triton.jit
def matrix_of(x, i_b, rows, columns):
    """The matrix [rows, columns] of memory ``i_b``."""
    return Matrix(x.p + i_b * x.s_b, rows, columns, x.s_row, x.s_col)


@triton.jit
def optional_matrix_of(x, i_b, rows, columns):
    """``matrix_of``, or () for None and (): Triton 3.6 returns no None from a device function."""
    if x is None:  # noqa: SIM114  Triton evaluates both sides of `or`
        return ()
    elif len(x) == 0:
        return ()
    else:
        return matrix_of(x, i_b, rows, columns)


@triton.jit
def or_empty(x):
    """() for None, which Triton 3.6 loses from a tuple in a loop."""
    if x is None:
        return ()
    else:
        return x


@triton.jit
def vector_of(x, i_b, size):
    """The vector of memory ``i_b``."""
    return Vector(x.p + i_b * x.s_b, size, x.s)


@triton.jit
def optional_vector_of(x, i_b, size):
    """``vector_of``, or () for None and ()."""
    if x is None:  # noqa: SIM114  Triton evaluates both sides of `or`
        return ()
    elif len(x) == 0:
        return ()
    else:
        return vector_of(x, i_b, size)


@triton.jit
def number_of(x, i_b):
    """The number of memory ``i_b``."""
    return tl.load(x.p + i_b * x.s_b)


@triton.jit
def result_of(p, i_b, rows, columns):
    """The matrix [rows, columns] of memory ``i_b`` in a contiguous tensor."""
    return Matrix(p + i_b * rows * columns, rows, columns, columns, 1)


@triton.jit
def results_of(p, i_b, size):
    """The vector of memory ``i_b`` in a contiguous tensor."""
    return Vector(p + i_b * size, size, 1)


@triton.jit
def row_of(x, i):
    return Vector(x.p + tl.cast(i, tl.int64) * x.s_row, x.columns, x.s_col)


@triton.jit
def transposed(x):
    return Matrix(x.p, x.columns, x.rows, x.s_col, x.s_row)


@triton.jit
def rows_from(x, first, count):
    """Rows [first, first + count) of a matrix."""
    return Matrix(x.p + tl.cast(first, tl.int64) * x.s_row, count, x.columns, x.s_row, x.s_col)


# ------------------------------------------------------------------------------------------------ parts of a workspace


@triton.jit
def place(p, rows, columns, ld):
    """The first part of a workspace: a matrix [rows, columns] with rows of ``ld`` numbers."""
    return Matrix(p, rows, columns, ld, 1)


@triton.jit
def end_of(x):
    """Where a part of a workspace ends."""
    return x.p + x.rows * x.s_row


@triton.jit
def place_after(x, rows, columns, ld):
    """The part of a workspace that begins where part ``x`` ends."""
    return Matrix(x.p + x.rows * x.s_row, rows, columns, ld, 1)


# --------------------------------------------------------------------------------------------------------------- tiles


@triton.jit
def load_tile(x, o_row, o_col):
    """Rows ``o_row`` and columns ``o_col`` of a matrix in float32, zero outside it."""
    m = (o_row < x.rows)[:, None] & (o_col < x.columns)[None, :]
    at = x.p + o_row.to(tl.int64)[:, None] * x.s_row + o_col.to(tl.int64)[None, :] * x.s_col
    return tl.load(at, mask=m, other=0.0).to(tl.float32)


@triton.jit
def store_tile(x, tile, o_row, o_col):
    m = (o_row < x.rows)[:, None] & (o_col < x.columns)[None, :]
    at = x.p + o_row.to(tl.int64)[:, None] * x.s_row + o_col.to(tl.int64)[None, :] * x.s_col
    tl.store(at, tile, mask=m)


@triton.jit
def pick(vector, o, i):
    """Entry ``i`` of a vector in registers."""
    return tl.sum(tl.where(o == i, vector, 0.0), 0)


@triton.jit
def diagonal(tile, o):
    return tl.sum(tl.where(o[:, None] == o[None, :], tile, 0.0), 1)


@triton.jit
def lower_triangle(o_row, o_col):
    """Mask of the entries on and below the diagonal."""
    return o_row[:, None] >= o_col[None, :]


# ------------------------------------------------------------------------------------------------------ whole matrices


@triton.jit
def copy(to, x):
    """Copy a matrix. Ends with a barrier."""
    for i in range(0, x.rows, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for j in range(0, x.columns, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            store_tile(to, load_tile(x, o_i, o_j), o_i, o_j)
    tl.debug_barrier()


@triton.jit
def fill_zero(to):
    """Ends with a barrier."""
    for i in range(0, to.rows, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for j in range(0, to.columns, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            store_tile(to, tl.zeros((BLOCK, BLOCK), tl.float32), o_i, o_j)
    tl.debug_barrier()


@triton.jit
def copy_or_zero(to, x):
    """Copy a matrix; () stands for zero. Ends with a barrier."""
    if len(x) == 0:
        fill_zero(to)
    else:
        copy(to, x)


@triton.jit
def add(to, x):
    """to += x for two matrices. Ends with a barrier."""
    for i in range(0, to.rows, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        for j in range(0, to.columns, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            store_tile(to, load_tile(to, o_i, o_j) + load_tile(x, o_i, o_j), o_i, o_j)
    tl.debug_barrier()


@triton.jit
def add_to_diagonal(to, value):
    """to += value I for one number. Ends with a barrier."""
    for i in range(0, to.rows, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        at = to.p + o_i.to(tl.int64) * (to.s_row + 1)
        tl.store(at, tl.load(at, mask=o_i < to.rows, other=0.0) + value, mask=o_i < to.rows)
    tl.debug_barrier()


@triton.jit
def load_diagonal(x, o, other):
    """Entries ``o`` of the diagonal of a matrix whose rows are contiguous, ``other`` outside it."""
    return tl.load(x.p + o.to(tl.int64) * (x.s_row + 1), mask=o < x.rows, other=other)
