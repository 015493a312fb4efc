"""Weights and values of patterns that may be masked. A masked pattern may hold anything, even NaN."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkm._linalg.triton.tiles import (
    BLOCK,
    assume_aligned,
    matrix_of,
    optional_matrix_of,
    optional_vector_of,
    store_tile,
    vector_of,
)
from fastkm._linalg.triton.vectors import load_vector

# Patterns that one pass conditions on.
CHUNK = tl.constexpr(16)


class Patterns(NamedTuple):
    """Weights [T, K], None while they are searched for, values z [T, C], noise variances [T], and mask [T] or None.

    As a kernel argument of every memory, and as ``patterns_of`` returns it of one, with () for None.
    """

    weights: Any
    z: Any
    noise: Any
    mask: Any


@triton.jit
def patterns_of(x, i_b, T, K, C, ALIGNED: tl.constexpr):
    """The patterns of memory ``i_b``. ALIGNED: the rows of the values are, as ``launch.rows_aligned`` found."""
    values = assume_aligned(x.z, ALIGNED)
    return Patterns(
        optional_matrix_of(x.weights, i_b, T, K),
        matrix_of(values, i_b, T, C),
        vector_of(x.noise, i_b, T),
        optional_vector_of(x.mask, i_b, T),
    )


@triton.jit
def starts_chunk(t):
    return tl.cast(t, tl.int32) % CHUNK == 0


@triton.jit
def is_written(mask, o_t, T):
    """Which patterns are written: all up to ``T`` but the masked ones."""
    m_t = o_t < T
    if len(mask) != 0:
        m_t = m_t & (load_vector(mask, o_t, 0) != 0)
    return m_t


@triton.jit
def load_patterns(x, o_t, o, m_written):
    """Rows ``o_t`` of weights or values in float32, zero where a pattern is masked."""
    m = m_written[:, None] & (o < x.columns)[None, :]
    at = x.p + o_t.to(tl.int64)[:, None] * x.s_row + o.to(tl.int64)[None, :] * x.s_col
    return tl.load(at, mask=m, other=0.0).to(tl.float32)


@triton.jit
def copy_patterns(to, x, mask):
    """Weights or values in float32, zero where a pattern is masked. The caller puts a barrier behind it."""
    for t in range(0, x.rows, BLOCK):
        o_t = t + tl.arange(0, BLOCK)
        m_written = is_written(mask, o_t, x.rows)
        for j in range(0, x.columns, BLOCK):
            o_j = j + tl.arange(0, BLOCK)
            store_tile(to, load_patterns(x, o_t, o_j, m_written), o_t, o_j)
