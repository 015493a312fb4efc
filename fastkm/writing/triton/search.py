"""The search for weights in Gram space, as forward and backward share it.

With G = R Rᵀ, X = Z Rᵀ and Q = Z Zᵀ the search lives in K and T. A pattern with weights w moves the mean to R + c δᵀ:

a = U w,  s = w·a + σ²,  c = a/s,  δ = z − Rᵀw,  r = R δ = x − G w,  δ·z = Q_tt − w·x,  δ·δ = δ·z − w·x + w·G w
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkm._linalg.triton.factor import factor
from fastkm._linalg.triton.launch import padded, warps
from fastkm._linalg.triton.patterns import copy_patterns
from fastkm._linalg.triton.product import product
from fastkm._linalg.triton.tiles import add_to_diagonal, copy, load_tile, row_of, store_tile, transposed
from fastkm._linalg.triton.vectors import (
    add_symmetric_outer,
    load_vector,
    product_with_vector,
    rows_at_once,
    solve_cholesky_vector,
    store_vector,
)


class Gram(NamedTuple):
    """Inner products of the rows of a memory and of its patterns, in the workspace."""

    gram: Any  # G [K, K]
    cross: Any  # X [T, K]
    inner: Any  # Q [T, T]
    z: Any  # Z [T, C], zero where masked


class System(NamedTuple):
    """The system that one solve of the search factors, in the workspace."""

    gram: Any  # G as the attempt before left it [K, K]
    lower: Any  # A, then Lᵀ [K, K]
    inverse: Any  # L⁻¹ [K, K]


class Change(NamedTuple):
    """What weights w would write: R + c δᵀ."""

    a: Any
    explained: Any  # w·a
    s: Any
    c: Any
    r: Any
    delta_z: Any  # δ·z
    delta_delta: Any  # δ·δ


class Attempt(NamedTuple):
    """What the next attempt needs to know of the one before: two vectors in memory and two numbers."""

    c: Any
    r: Any
    delta_z: Any
    delta_delta: Any


def search_options(rows: int, many_registers: bool = True) -> dict[str, int]:
    """Options of a kernel that holds vectors of ``rows`` numbers in registers.

    A search without refactoring takes 128 to 151 registers at 16 or 32 rows, which leaves room for one more program on
    a multiprocessor than no limit does. At other numbers of rows it spills with 168, and a search that refactors may.
    """
    number = 4 if rows <= 32 else 8
    return {"SIZE": padded(rows), **warps(number, 255 if many_registers or number > 4 else None)}


@triton.jit
def find_inner_products(to, mean, patterns):
    """Z with zeros for masked patterns, G, X and Q."""
    copy_patterns(to.z, patterns.z, patterns.mask)
    product(to.gram, mean, transposed(mean))
    product(to.cross, to.z, transposed(mean))
    product(to.inner, to.z, transposed(to.z))


@triton.jit
def move_gram(gram, c, r, delta_delta, sign):
    """G += sign (c rᵀ + r cᵀ + δ·δ c cᵀ): what R + c δᵀ does to the Gram matrix."""
    add_symmetric_outer(gram, 2.0 * sign, c, r)
    add_symmetric_outer(gram, delta_delta * sign, c, c)


@triton.jit
def advance_cross(cross, inner, tape, t, w, c):
    """X of the patterns after t, one with weights w that moved the mean by c δᵀ:  x ← x + c (δ·z).

    ``tape``: keeps δ·z of each of them, or None.
    """
    ROWS: tl.constexpr = rows_at_once(w.shape[0])
    o = tl.arange(0, w.shape[0])
    tl.debug_barrier()
    for i in range(t + 1, cross.rows, ROWS):
        o_i = i + tl.arange(0, ROWS)
        x = load_tile(cross, o_i, o)
        delta_z = load_vector(row_of(transposed(inner), t), o_i) - tl.sum(x * w[None, :], 1)
        tl.debug_barrier()
        store_tile(cross, x + delta_z[:, None] * c[None, :], o_i, o)
        if tape is not None:
            store_vector(tape, delta_z, o_i)
    tl.debug_barrier()


@triton.jit
def factor_attempt(system, gram, x, before, again, ridge, SQUARED: tl.constexpr, SINGLE: tl.constexpr):
    """Factor G + λI, or SQUARED G² + λI, for the next attempt. Returns its x and whether A is positive definite.

    ``again``: the attempt ``before`` has moved G and x.
    """
    o = tl.arange(0, x.shape[0])
    copy(system.gram, gram)
    if again:
        move_gram(system.gram, before.c, before.r, before.delta_delta, 1.0)
        x += before.delta_z * load_vector(before.c, o)
    if SQUARED:
        product(system.lower, system.gram, system.gram)
    else:
        copy(system.lower, system.gram)
    add_to_diagonal(system.lower, ridge)
    _, good = factor(system.lower, system.inverse, SINGLE)
    return x, good


@triton.jit
def solve_attempt(system, x, buffer, SQUARED: tl.constexpr):
    """The right-hand side, x or G x, and the weights that solve for it."""
    if SQUARED:
        x = product_with_vector(buffer, system.gram, x)
    return x, solve_cholesky_vector(buffer, system.inverse, x)


@triton.jit
def find_change(gram, cov, buffer, x, w, inner, noise):
    """What weights w would write; ``inner`` is Q_tt."""
    a = product_with_vector(buffer, cov, w)
    g = product_with_vector(buffer, gram, w)
    explained = tl.sum(w * a, 0)
    s = tl.maximum(explained, 0.0) + noise
    delta_z = inner - tl.sum(w * x, 0)
    delta_delta = delta_z - tl.sum(w * x, 0) + tl.sum(w * g, 0)
    return Change(a, explained, s, a / s, x - g, delta_z, delta_delta)
