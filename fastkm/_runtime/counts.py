"""The fewest floating-point operations by which we know to compute each registered operator, for one memory.

Products, factors and solves are counted; passes over single entries are left out. Where a result is symmetric, half of
it is computed. K rows, C entries of a code, T patterns, Q queries.
"""

from typing import NamedTuple


class Flops(NamedTuple):
    """Operations of a whole call; a multiplication and the addition after it are two."""

    codes: int  # products with codes, which ``precision`` sends through tensor cores
    other: int  # always float32


def product(m: int, n: int, k: int) -> int:
    """A [m, k] times B [k, n]."""
    return 2 * m * n * k


def symmetric_product(n: int, k: int) -> int:
    """A symmetric sum over k, [n, n]: one triangle and the diagonal."""
    return n * (n + 1) * k


def third(n: int) -> int:
    """About n³/3: a Cholesky factor L, also L⁻¹, also the symmetric L⁻ᵀ L⁻¹, also L₁⁻¹ L₂."""
    return n * (n + 1) * (2 * n + 1) // 6


def triangular_solve(n: int, columns: int) -> int:
    return n * n * columns


def update_posterior(K: int, C: int, T: int, Q: int) -> Flops:
    # Pattern by pattern needs the fewest. Codes: Rᵀw and a δᵀ. Other: U w and one triangle of a aᵀ.
    return Flops(2 * product(T, C, K), product(T, K, K) + symmetric_product(K, T))


def update_posterior_backward(K: int, C: int, T: int, Q: int) -> Flops:
    # Codes: Rᵀw again for δ, then R̄'δ, R̄'ᵀa, R δ̄, w δ̄ᵀ. Other: U w again, Ū'a, U ā, and two triangles of sym(ā wᵀ).
    return Flops(5 * product(T, C, K), 3 * product(T, K, K) + 2 * symmetric_product(K, T))


# A removal is an update of −U, and a replacement an update and a removal.
remove_patterns, remove_patterns_backward = update_posterior, update_posterior_backward


def replace_patterns(K: int, C: int, T: int, Q: int) -> Flops:
    return Flops(*(2 * count for count in update_posterior(K, C, T, Q)))


def replace_patterns_backward(K: int, C: int, T: int, Q: int) -> Flops:
    # The memory between the two is computed again.
    once, back = update_posterior(K, C, T, Q), update_posterior_backward(K, C, T, Q)
    return Flops(once.codes + 2 * back.codes, once.other + 2 * back.other)


def update_square_root(K: int, C: int, T: int, Q: int) -> Flops:
    # Codes as an update. Other: Sᵀw, S p, and p (S p)ᵀ, which is not symmetric.
    return Flops(2 * product(T, C, K), 3 * product(T, K, K))


def update_square_root_backward(K: int, C: int, T: int, Q: int) -> Flops:
    # Codes as an update's. Other: Sᵀw and S p again; with the cotangent of S', its products with p and with S p; for
    # the cotangents of p and w two more; and three outer products.
    return Flops(5 * product(T, C, K), 9 * product(T, K, K))


def filter_posterior(K: int, C: int, T: int, Q: int) -> Flops:
    # An update, and step by step Rᵀq and U q.
    update = update_posterior(K, C, T, Q)
    return Flops(update.codes + product(T, C, K), update.other + product(T, K, K))


def filter_posterior_backward(K: int, C: int, T: int, Q: int) -> Flops:
    # An update's, with the reads of both it and the cotangent: R ō and q ōᵀ; U q again, Ū q or U q v̄, and a triangle of
    # v̄ q qᵀ.
    update = update_posterior_backward(K, C, T, Q)
    return Flops(update.codes + 2 * product(T, C, K), update.other + product(T, K, K) + symmetric_product(K, T))


def write(K: int, C: int, T: int, Q: int) -> Flops:
    # An update, and for each pattern R z and one solve. R Rᵀ is factored once, as if later factors cost nothing.
    update = update_posterior(K, C, T, Q)
    solved = symmetric_product(K, C) + third(K) + 2 * triangular_solve(K, T)
    return Flops(update.codes + product(T, K, C), update.other + solved)


def write_backward(K: int, C: int, T: int, Q: int) -> Flops:
    # An update's backward, and for each pattern v = A⁻¹ w̄, Rᵀv and v δᵀ; w (Rᵀv)ᵀ is part of w δ̄ᵀ. R Rᵀ is factored
    # again.
    update = update_posterior_backward(K, C, T, Q)
    solved = symmetric_product(K, C) + third(K) + 2 * triangular_solve(K, T)
    return Flops(update.codes + 2 * product(T, C, K), update.other + solved)


def write_gram(K: int, C: int, T: int, Q: int) -> Flops:
    # A write without codes: the factor and the solves, U w and a triangle of a aᵀ; and x of the later patterns follows.
    solved = third(K) + 2 * triangular_solve(K, T)
    return Flops(0, solved + product(T, K, K) + symmetric_product(K, T) + 2 * symmetric_product(T, K))


update_posterior_into, write_into = update_posterior, write


def stream_patterns(K: int, C: int, T: int, Q: int) -> Flops:
    # An update; R z and R δ; H x, H c and H r; and H less one square, plus another.
    update = update_posterior(K, C, T, Q)
    return Flops(update.codes + 2 * product(T, C, K), update.other + 3 * product(T, K, K) + 2 * symmetric_product(K, T))


def refresh_streams(K: int, C: int, T: int, Q: int) -> Flops:
    # R Rᵀ, its factor, the factor's inverse, and that one's square.
    return Flops(0, symmetric_product(K, C) + 3 * third(K))


def solve_addressing(K: int, C: int, T: int, Q: int) -> Flops:
    # R Rᵀ or RᵀR, whichever is smaller, its factor, R z, and two triangular solves a query; with more queries than
    # the other side is long, the solves are done once for R.
    small, large = min(K, C), max(K, C)
    solved = symmetric_product(small, large) + third(small) + 2 * triangular_solve(small, min(Q, large))
    return Flops(product(Q, K, C), solved)


def factor_addressing(K: int, C: int, T: int, Q: int) -> Flops:
    return Flops(0, symmetric_product(K, C) + third(K) + 2 * triangular_solve(K, C))


def solve_factored(K: int, C: int, T: int, Q: int) -> Flops:
    return Flops(product(Q, K, C), 0)


def read_factored(K: int, C: int, T: int, Q: int) -> Flops:
    # However many the iterations, they are one linear map; only a solve for each query is counted.
    return Flops(product(Q, K, C) + product(Q, C, min(K, C)), 0)


def read_factored_backward(K: int, C: int, T: int, Q: int) -> Flops:
    # The weights again; R times the cotangent of the values, one solve, its Rᵀ, two outer products for R̄; and R̄ of the
    # Gram matrix, whose cotangent is a sum over queries.
    small, large = min(K, C), max(K, C)
    solved = 2 * triangular_solve(small, Q) + symmetric_product(small, min(Q, large)) + product(small, large, small)
    return Flops(5 * product(Q, C, K), solved)


def read(K: int, C: int, T: int, Q: int) -> Flops:
    # Addressing and Rᵀw. However many the iterations, they are one linear map of the weights.
    addressed = solve_addressing(K, C, T, Q)
    return Flops(addressed.codes + product(Q, C, min(K, C)), addressed.other)


def read_backward(K: int, C: int, T: int, Q: int) -> Flops:
    # R z and a solve again; R times the cotangent of the values, another solve, its Rᵀ, and two outer products for R̄;
    # the cotangent of R Rᵀ is a sum over queries, and goes into R̄ by one product with R.
    addressed = solve_addressing(K, C, T, Q)
    small, large = min(K, C), max(K, C)
    solved = (
        2 * triangular_solve(small, min(Q, large))
        + symmetric_product(small, min(Q, large))
        + product(small, large, small)
    )
    return Flops(addressed.codes + 4 * product(Q, C, K), addressed.other + solved)


def kl_memory(K: int, C: int, T: int, Q: int) -> Flops:
    # Both factors, L0⁻¹ L and L0⁻¹ (R − R0).
    return Flops(0, 3 * third(K) + triangular_solve(K, C))


def kl_memory_backward(K: int, C: int, T: int, Q: int) -> Flops:
    # Both factors and both inverses, U0⁻¹ L half of whose terms are zero, its square; E = U0⁻¹ (R − R0) and E Eᵀ.
    gap = product(K, K, K) // 2 + symmetric_product(K, K)
    return Flops(0, 6 * third(K) + gap + 2 * triangular_solve(K, C) + symmetric_product(K, C))


def logdet(K: int, C: int, T: int, Q: int) -> Flops:
    return Flops(0, third(K))


def logdet_backward(K: int, C: int, T: int, Q: int) -> Flops:
    # The factor, its inverse, and that one's square.
    return Flops(0, 3 * third(K))
