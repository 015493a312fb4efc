"""What the backward of write keeps in its workspace: states, cotangents, and a tape of what the search did."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkm._linalg.triton.tiles import end_of, place, place_after, row_of
from fastkm._linalg.triton.vectors import load_entry
from fastkm.writing.triton.search import Attempt, Gram, System


class Cotangents(NamedTuple):
    """In the workspace, or still in registers: cotangents of what the search works on."""

    gram: Any  # [K, K]
    cov: Any  # [K, K]
    moved: Any  # of G as the attempt before left it [K, K]
    cross: Any  # [T, K]
    inner: Any  # [T, T], in its lower triangle


class Tape(NamedTuple):
    """What the search did, in the workspace."""

    a: Any  # [T, K]
    c: Any  # [T, K]
    r: Any  # [T, K]
    delta_z: Any  # δ·z of every pattern with every later one [T, T]
    delta_delta: Any  # [1, T]
    attempts: Any  # w, c and r of every attempt at one pattern [3 · num_opt_iters, K]
    numbers: Any  # s, δ·z and δ·δ of each of them [num_opt_iters, 3]


class Parts(NamedTuple):
    """The workspace of one memory."""

    gram: Any
    cov: Any  # U [K, K]
    system: Any
    to: Any
    tape: Any
    vectors: Any  # [5, K]; the last is the buffer of products
    end: Any


@triton.jit
def search_backward_layout(p, K, C, T, ld, num_opt_iters):
    gram = place(p, K, K, ld)
    lower = place_after(gram, K, K, ld)
    inverse = place_after(lower, K, K, ld)
    moved = place_after(inverse, K, K, ld)
    cov = place_after(moved, K, K, ld)
    to_gram = place_after(cov, K, K, ld)
    to_cov = place_after(to_gram, K, K, ld)
    to_moved = place_after(to_cov, K, K, ld)
    cross = place_after(to_moved, T, K, ld)
    to_cross = place_after(cross, T, K, ld)
    a = place_after(to_cross, T, K, ld)
    c = place_after(a, T, K, ld)
    r = place_after(c, T, K, ld)
    inner = place_after(r, T, T, T)
    to_inner = place_after(inner, T, T, T)
    delta_z = place_after(to_inner, T, T, T)
    delta_delta = place_after(delta_z, 1, T, T)
    values = place_after(delta_delta, T, C, C)
    vectors = place_after(values, 5, K, ld)
    attempts = place_after(vectors, 3 * num_opt_iters, K, ld)
    numbers = place_after(attempts, num_opt_iters, 3, 16)
    return Parts(
        Gram(gram, cross, inner, values),
        cov,
        System(moved, lower, inverse),
        Cotangents(to_gram, to_cov, to_moved, to_cross, to_inner),
        Tape(a, c, r, delta_z, delta_delta, attempts, numbers),
        vectors,
        end_of(numbers),
    )


@triton.jit
def load_attempt(tape, n, again):
    """Attempt n, which is there if ``again``."""
    delta_z, delta_delta = tl.full((), 0, tl.float32), tl.full((), 0, tl.float32)
    if again:
        delta_z, delta_delta = load_entry(row_of(tape.numbers, n), 1), load_entry(row_of(tape.numbers, n), 2)
    return Attempt(row_of(tape.attempts, 3 * n + 1), row_of(tape.attempts, 3 * n + 2), delta_z, delta_delta)
