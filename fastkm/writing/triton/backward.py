"""Backward kernel of write: through the update with the weights that were found, then through the search."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkm._linalg.triton.condition_backward import update_backward
from fastkm._linalg.triton.launch import (
    factoring,
    implements,
    mask_vectors,
    matrices,
    numbers,
    row_stride,
    vectors,
    workspace,
)
from fastkm._linalg.triton.patterns import Patterns, is_written, patterns_of
from fastkm._linalg.triton.product import product
from fastkm._linalg.triton.tiles import (
    add,
    copy,
    fill_zero,
    load_tile,
    matrix_of,
    number_of,
    optional_matrix_of,
    result_of,
    results_of,
    row_of,
    store_tile,
    transposed,
)
from fastkm._linalg.triton.vectors import (
    add_symmetric_outer,
    load_entry,
    load_vector,
    product_with_vector,
    rows_at_once,
    share_vector,
    solve_cholesky_vector,
    store_vector,
)
from fastkm.writing.triton.search import (
    Attempt,
    advance_cross,
    factor_attempt,
    find_change,
    find_inner_products,
    move_gram,
    search_options,
    solve_attempt,
)
from fastkm.writing.triton.tape import load_attempt, search_backward_layout


class Gradients(NamedTuple):
    """What write_backward returns but for the ridge: they hold what comes through the update, and are added to."""

    mean: Any
    cov: Any
    z: Any
    noise: Any


class AttemptCotangents(NamedTuple):
    """Cotangents of one attempt, in registers: of its weights and of the change that it would write."""

    w: Any
    a: Any
    c: Any
    r: Any
    delta_z: Any
    delta_delta: Any


class Received(NamedTuple):
    """What has come to the arguments of the search, at one pattern but for the ridge, in registers."""

    x: Any
    inner: Any
    noise: Any
    ridge: Any


@triton.jit
def search_backward_kernel(
    mean, cov, patterns, ridge, p_to_weights, grad_weights, to, p_to_ridge, workspaces, K, C, T, ld, num_opt_iters,
    SQUARED: tl.constexpr, SINGLE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Undo the search pattern by pattern in K and T; the cotangents of G, X and Q become those of the codes at the end.

    Adds to gradients that already hold what comes through the update with these weights.

    Bytes moved: at least the inputs of the search and the cotangent of its weights in, and the gradients in and out,
    each once. States, tape and cotangents lie in the workspace.
    """
    i_b = tl.program_id(0).to(tl.int64)
    mean, cov, ridge = matrix_of(mean, i_b, K, C), matrix_of(cov, i_b, K, K), number_of(ridge, i_b)
    patterns = patterns_of(patterns, i_b, T, K, C, False)
    to_weights, grad_weights = result_of(p_to_weights, i_b, T, K), optional_matrix_of(grad_weights, i_b, T, K)
    to = Gradients(
        result_of(to.mean, i_b, K, C),
        result_of(to.cov, i_b, K, K),
        result_of(to.z, i_b, T, C),
        results_of(to.noise, i_b, T),
    )
    parts = search_backward_layout(workspaces.p + i_b * workspaces.s_b, K, C, T, ld, num_opt_iters)
    find_inner_products(parts.gram, mean, patterns)
    copy(parts.cov, cov)
    fill_zero(parts.to.gram)
    fill_zero(parts.to.cov)
    fill_zero(parts.to.cross)
    fill_zero(parts.to.inner)
    for t in range(T):
        write_again(parts, patterns, t, SIZE)
    to_ridge = tl.full((), 0, tl.float32)
    for back in range(T):
        t = T - 1 - back
        written = tl.sum(is_written(patterns.mask, t + tl.arange(0, 1), T).to(tl.int32), 0)
        if written > 0:
            to_w = load_vector(row_of(to_weights, t), tl.arange(0, SIZE))
            if grad_weights is not None:
                to_w += load_vector(row_of(grad_weights, t), tl.arange(0, SIZE))
            to_ridge = back_through_pattern(parts, patterns, to.noise, to_w, t, ridge, to_ridge, num_opt_iters,
                                            SQUARED, SINGLE)  # fmt: skip
    back_to_codes(to, parts, mean)
    tl.store(p_to_ridge + i_b, to_ridge)


@triton.jit
def write_again(parts, patterns, t, SIZE: tl.constexpr):
    """Write pattern t with the weights that were found, and put what it did on the tape."""
    o = tl.arange(0, SIZE)
    tape = parts.tape
    x, w = load_vector(row_of(parts.gram.cross, t), o), load_vector(row_of(patterns.weights, t), o)
    inner, noise = load_entry(row_of(parts.gram.inner, t), t), load_entry(patterns.noise, t)
    change = find_change(parts.gram.gram, parts.cov, row_of(parts.vectors, 4), x, w, inner, noise)
    a, c, r = row_of(tape.a, t), row_of(tape.c, t), row_of(tape.r, t)
    tl.store(tape.delta_delta.p + t, change.delta_delta)
    share_vector(a, change.a, o)
    share_vector(c, change.c, o)
    share_vector(r, change.r, o)
    move_gram(parts.gram.gram, c, r, change.delta_delta, 1.0)
    add_symmetric_outer(parts.cov, -1.0, a, c)
    advance_cross(parts.gram.cross, parts.gram.inner, row_of(tape.delta_z, t), t, w, change.c)


@triton.jit
def back_through_pattern(
    parts, patterns, to_noise, to_w, t, ridge, to_ridge, num_opt_iters, SQUARED: tl.constexpr, SINGLE: tl.constexpr
):
    """Undo pattern t and go back through its attempts, from the cotangent of its weights. Returns λ̄."""
    o = tl.arange(0, to_w.shape[0])
    tape, to = parts.tape, parts.to
    noise, inner = load_entry(patterns.noise, t), load_entry(row_of(parts.gram.inner, t), t)
    delta_delta = load_entry(row_of(tape.delta_delta, 0), t)
    move_gram(parts.gram.gram, row_of(tape.c, t), row_of(tape.r, t), delta_delta, -1.0)
    add_symmetric_outer(parts.cov, 1.0, row_of(tape.a, t), row_of(tape.c, t))
    x, w = load_vector(row_of(parts.gram.cross, t), o), load_vector(row_of(patterns.weights, t), o)
    attempt_again(parts, x, w, inner, noise, ridge, num_opt_iters, SQUARED, SINGLE)
    grads = back_through_write(parts, to_w, w, delta_delta, t, num_opt_iters)
    to_inner = row_of(to.inner, t)
    received = Received(load_vector(row_of(to.cross, t), o), load_entry(to_inner, t), load_entry(to_noise, t), to_ridge)
    for back in range(num_opt_iters):
        n = num_opt_iters - 1 - back
        grads, received = back_through_attempt(parts, grads, received, x, n, ridge, SQUARED, SINGLE)
    share_vector(row_of(to.cross, t), received.x, o)
    tl.store(to_inner.p + t, received.inner)
    tl.store(to_noise.p + t, received.noise)
    tl.debug_barrier()
    return received.ridge


@triton.jit
def attempt_again(parts, x, w, inner, noise, ridge, num_opt_iters, SQUARED: tl.constexpr, SINGLE: tl.constexpr):
    """Put every attempt at one pattern on the tape; the last one found w. Ends with a barrier."""
    o = tl.arange(0, w.shape[0])
    tape, buffer = parts.tape, row_of(parts.vectors, 4)
    delta_z, delta_delta = tl.full((), 0, tl.float32), tl.full((), 0, tl.float32)
    for n in range(num_opt_iters):
        if n + 1 < num_opt_iters:
            c, r = row_of(tape.attempts, 3 * n - 2), row_of(tape.attempts, 3 * n - 1)
            before = Attempt(c, r, delta_z, delta_delta)
            target, _ = factor_attempt(parts.system, parts.gram.gram, x, before, n > 0, ridge, SQUARED, SINGLE)
            _, found = solve_attempt(parts.system, target, buffer, SQUARED)
        else:
            found = w
        change = find_change(parts.gram.gram, parts.cov, buffer, x, found, inner, noise)
        delta_z, delta_delta = change.delta_z, change.delta_delta
        share_vector(row_of(tape.attempts, 3 * n), found, o)
        share_vector(row_of(tape.attempts, 3 * n + 1), change.c, o)
        share_vector(row_of(tape.attempts, 3 * n + 2), change.r, o)
        p_numbers = row_of(tape.numbers, n).p
        tl.store(p_numbers, change.s)
        tl.store(p_numbers + 1, delta_z)
        tl.store(p_numbers + 2, delta_delta)
    tl.debug_barrier()


@triton.jit
def back_through_write(parts, to_w, w, delta_delta, t, num_opt_iters):
    """Through G' = G + c rᵀ + r cᵀ + δ·δ c cᵀ, U' = U − a cᵀ and X', as the last attempt wrote them."""
    o = tl.arange(0, w.shape[0])
    to, buffer, last = parts.to, row_of(parts.vectors, 4), num_opt_iters - 1
    c, r = (
        load_vector(row_of(parts.tape.attempts, 3 * last + 1), o),
        load_vector(row_of(parts.tape.attempts, 3 * last + 2), o),
    )
    s = load_entry(row_of(parts.tape.numbers, last), 0)
    gram_c, gram_r = product_with_vector(buffer, to.gram, c), product_with_vector(buffer, to.gram, r)
    cov_c = product_with_vector(buffer, to.cov, c)
    to_c = 2 * gram_r + 2 * delta_delta * gram_c - s * cov_c
    to_w, to_c = retreat_cross(parts, t, w, c, to_w, to_c)
    zero = tl.full((), 0, tl.float32)
    return AttemptCotangents(to_w, -cov_c, to_c, 2 * gram_c, zero, tl.sum(c * gram_c, 0))


@triton.jit
def retreat_cross(parts, t, w, c, to_w, to_c):
    """Undo ``advance_cross``, and add what the patterns after t pass on to w and c. Ends with a barrier."""
    ROWS: tl.constexpr = rows_at_once(w.shape[0])
    o = tl.arange(0, w.shape[0])
    cross, to_cross, to_inner = parts.gram.cross, parts.to.cross, row_of(transposed(parts.to.inner), t)
    tl.debug_barrier()
    for i in range(t + 1, cross.rows, ROWS):
        o_i = i + tl.arange(0, ROWS)
        delta_z = load_vector(row_of(parts.tape.delta_z, t), o_i)
        x = load_tile(cross, o_i, o) - delta_z[:, None] * c[None, :]
        to_x = load_tile(to_cross, o_i, o)
        to_delta_z = tl.sum(to_x * c[None, :], 1)
        to_c += tl.sum(delta_z[:, None] * to_x, 0)
        to_w -= tl.sum(to_delta_z[:, None] * x, 0)
        before = load_vector(to_inner, o_i)
        tl.debug_barrier()
        store_vector(to_inner, before + to_delta_z, o_i)
        store_tile(cross, x, o_i, o)
        store_tile(to_cross, to_x - to_delta_z[:, None] * w[None, :], o_i, o)
    tl.debug_barrier()
    return to_w, to_c


@triton.jit
def back_through_attempt(parts, grads, received, x, n, ridge, SQUARED: tl.constexpr, SINGLE: tl.constexpr):
    """Through the change that attempt n would write, and through its solve to the attempt before."""
    o = tl.arange(0, x.shape[0])
    tape, to, buffer, shared = parts.tape, parts.to, row_of(parts.vectors, 4), row_of(parts.vectors, 0)
    p_w = row_of(tape.attempts, 3 * n)
    w, c = load_vector(p_w, o), load_vector(row_of(tape.attempts, 3 * n + 1), o)
    r, s = load_vector(row_of(tape.attempts, 3 * n + 2), o), load_entry(row_of(tape.numbers, n), 0)

    # δ·δ = δ·z − w·x + w·g,  δ·z = Q_tt − w·x,  r = x − g,  g = G w
    to_delta_z = grads.delta_z + grads.delta_delta
    to_g = grads.delta_delta * w - grads.r
    to_w = grads.w + (-grads.delta_delta * r - to_delta_z * x)
    to_x = received.x + (grads.r - (grads.delta_delta + to_delta_z) * w)
    to_w += product_with_vector(buffer, parts.gram.gram, to_g)
    share_vector(shared, to_g, o)
    add_symmetric_outer(to.gram, 1.0, shared, p_w)

    # c = a/s,  s = w·a + σ²,  a = U w
    to_s = -tl.sum(grads.c * c, 0) / s
    to_a = grads.a + (grads.c / s + to_s * w)
    to_w += s * to_s * c + product_with_vector(buffer, parts.cov, to_a)
    share_vector(shared, to_a, o)
    add_symmetric_outer(to.cov, 1.0, shared, p_w)

    # (G + λI) w = x, or (G² + λI) w = G x, with the G and x that the attempt before left.
    before = load_attempt(tape, n - 1, n > 0)
    target, good = factor_attempt(parts.system, parts.gram.gram, x, before, n > 0, ridge, SQUARED, SINGLE)
    to_target, to_ridge = back_through_solve(parts, to_w, w, p_w, target, good, SQUARED)
    grads = back_through_before(parts, before, to_target, n > 0)
    inner, noise = received.inner + to_delta_z, received.noise + to_s
    return grads, Received(to_x + to_target, inner, noise, received.ridge - to_ridge)


@triton.jit
def back_through_solve(parts, to_w, w, p_w, target, good, SQUARED: tl.constexpr):
    """Cotangents of the x of one solve, returned with −λ̄, and of its G, in ``to.moved`` and added to ``to.gram``."""
    o = tl.arange(0, w.shape[0])
    to_moved, moved, buffer = parts.to.moved, parts.system.gram, row_of(parts.vectors, 4)
    first, second, third = row_of(parts.vectors, 0), row_of(parts.vectors, 1), row_of(parts.vectors, 2)
    v = solve_cholesky_vector(buffer, parts.system.inverse, to_w)
    v = tl.where(good, v, float("nan"))  # without a factor there is no gradient
    to_ridge = tl.sum(v * w, 0)
    fill_zero(to_moved)
    share_vector(first, v, o)
    if SQUARED:
        gram_v, gram_w = product_with_vector(buffer, moved, v), product_with_vector(buffer, moved, w)
        fourth = row_of(parts.vectors, 3)
        share_vector(second, gram_v, o)
        share_vector(third, gram_w, o)
        share_vector(fourth, target, o)
        add_symmetric_outer(to_moved, -1.0, first, third)
        add_symmetric_outer(to_moved, -1.0, second, p_w)
        add_symmetric_outer(to_moved, 1.0, first, fourth)
        to_target = gram_v
    else:
        add_symmetric_outer(to_moved, -1.0, first, p_w)
        to_target = v
    add(parts.to.gram, to_moved)
    return to_target, to_ridge


@triton.jit
def back_through_before(parts, before, to_target, again):
    """Cotangents of the attempt that moved G and x before a solve, zero if there is none."""
    o = tl.arange(0, to_target.shape[0])
    zeros = tl.zeros(to_target.shape, tl.float32)
    to_c, to_r = zeros, zeros
    to_delta_z, to_delta_delta = tl.full((), 0, tl.float32), tl.full((), 0, tl.float32)
    if again:
        buffer = row_of(parts.vectors, 4)
        c, r = load_vector(before.c, o), load_vector(before.r, o)
        gram_c = product_with_vector(buffer, parts.to.moved, c)
        gram_r = product_with_vector(buffer, parts.to.moved, r)
        to_c = 2 * gram_r + 2 * before.delta_delta * gram_c + before.delta_z * to_target
        to_r = 2 * gram_c
        to_delta_z, to_delta_delta = tl.sum(c * to_target, 0), tl.sum(c * gram_c, 0)
    return AttemptCotangents(zeros, zeros, to_c, to_r, to_delta_z, to_delta_delta)


@triton.jit
def back_to_codes(to, parts, mean):
    """From the cotangents of G, X and Q to those of the codes, and of U."""
    to_gram, to_cross, to_inner, values = parts.to.gram, parts.to.cross, parts.to.inner, parts.gram.z
    product(to.mean, to_gram, mean, scale=2.0, accumulate=True)
    product(to.mean, transposed(to_cross), values, accumulate=True)
    product(to.z, to_cross, mean, accumulate=True)
    product(to.z, to_inner, values, accumulate=True)
    product(to.z, transposed(to_inner), values, accumulate=True)
    add(to.cov, parts.to.cov)


@implements("write_backward")
def write_backward(
    mean, cov, values, noise_var, ridge, num_opt_iters, squared_gram, mask, precision, weights,
    grad_mean, grad_cov, grad_weights, grad_innovation_var, grad_kl,
):  # fmt: skip
    """Through the update with the weights that were found, then through the search that found them."""
    (B, K, C), T, ld = mean.shape, values.shape[1], row_stride(mean.shape[1])
    to_mean, to_cov, to_weights, to_values, to_noise = update_backward(
        mean, cov, weights, values, noise_var, mask, precision, grad_mean, grad_cov, grad_innovation_var, grad_kl, None
    )
    to, to_ridge = Gradients(to_mean, to_cov, to_values, to_noise), mean.new_empty(B)
    if B:
        patterns = Patterns(matrices(weights), matrices(values), vectors(noise_var), mask_vectors(mask))
        search_backward_kernel[(B,)](
            matrices(mean), matrices(cov), patterns, numbers(ridge), to_weights, matrices(grad_weights), to, to_ridge,
            workspace(mean, B, search_backward_layout, K, C, T, ld, num_opt_iters), K, C, T, ld, num_opt_iters,
            SQUARED=squared_gram, **factoring(K) | search_options(K),
        )  # fmt: skip
    return *to, to_ridge
