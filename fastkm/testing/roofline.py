"""The time that no kernel can beat on one H100, from bytes and operations alone.

A bound, never a measurement. It asks of every operation only what cannot be left out: each input is read from memory
once, each output written once, and the fewest operations by which we know to compute it. Whatever else costs time
(launches, waiting for one another, a chip that few memories cannot fill) is left out. Operands that a call before left
in the L2 cache can come faster than from memory, so only a cold call is held against it.

Ceilings: NVIDIA H100 Tensor Core GPU datasheet, the SXM form: 3.35 TB/s of memory bandwidth, 67 TFLOP/s in float32, and
989 TFLOP/s in TF32 on tensor cores with sparsity, half of which is dense.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import fastkm._runtime.schema  # noqa: F401  declares the operators
from fastkm.testing.presets import PRESETS, Preset

BANDWIDTH = 3.35e12  # bytes a second
FLOAT32 = 67e12  # operations a second; a multiplication and the addition after it are two
TENSOR = {"tf32x3": 989e12 / 2 / 3, "tf32": 989e12 / 2}  # three products make one that is nearly float32
ITERATIONS = 10  # of a read; the bound does not depend on them


class Flops(NamedTuple):
    """Operations of a whole call."""

    codes: int  # products with codes, which ``precision`` sends through tensor cores
    other: int  # always float32


class Bound(NamedTuple):
    bytes: int
    flops: Flops
    seconds: float
    by: str  # what takes this long


# ---- bytes ---------------------------------------------------------------------------------------------------------


def inputs(operator: str, preset: Preset, batch: int, queries: int, precision: int = 0, device: str = "meta") -> tuple:
    """Arguments of an operator, tensors not filled: float32, no mask, a cotangent for every output."""
    K, C, T = preset.K, preset.C, preset.T

    def tensor(*shape: int) -> Tensor:
        return torch.empty(batch, *shape, device=device)

    mean, cov, weights, values, per_pattern = tensor(K, C), tensor(K, K), tensor(T, K), tensor(T, C), tensor(T)
    asked, found, per_memory = tensor(queries, C), tensor(queries, K), tensor()
    update = (mean, cov, weights, values, per_pattern, None, precision)
    write = (mean, cov, values, per_pattern, per_memory, 1, False, None, precision)
    read = (mean, asked, per_memory, ITERATIONS, False, precision)
    return {
        "update_posterior": update,
        "update_posterior_backward": (*update, mean, cov, per_pattern, per_pattern, per_memory),
        "write": write,
        "write_backward": (*write, weights, mean, cov, weights, per_pattern, per_pattern),
        "read": read,
        "read_backward": (*read, asked, found),
        "solve_addressing": (mean, asked, per_memory, False),
        "factor_addressing": (mean, per_memory),
        "solve_factored": (mean, cov, asked),
        "kl_memory": (mean, cov, mean, cov),
        "kl_memory_backward": (mean, cov, mean, cov, per_memory),
        "logdet": (cov,),
        "logdet_backward": (cov, per_memory),
    }[operator]


def bytes_to_move(operator: str, arguments: tuple) -> int:
    """Of every tensor that goes in and, by the operator's own schema, of every one that comes out."""
    outputs = getattr(torch.ops.fastkm, operator)(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum(x.numel() * x.element_size() for x in (*arguments, *outputs) if isinstance(x, Tensor))


# ---- operations ----------------------------------------------------------------------------------------------------
# Of products, factors and solves; passes over single entries are left out. Where a result is symmetric, half of it is
# computed.


def product(m: int, n: int, k: int) -> int:
    """A [m, k] times B [k, n]."""
    return 2 * m * n * k


def symmetric(n: int, k: int) -> int:
    """A symmetric sum over k, [n, n]: one triangle and the diagonal."""
    return n * (n + 1) * k


def third(n: int) -> int:
    """About n³/3: a Cholesky factor L, also L⁻¹, also the symmetric L⁻ᵀ L⁻¹, also L₁⁻¹ L₂."""
    return n * (n + 1) * (2 * n + 1) // 6


def triangular_solve(n: int, columns: int) -> int:
    return n * n * columns


def update_posterior(K: int, C: int, T: int, Q: int) -> Flops:
    # Pattern by pattern, the form with the fewest: Rᵀw and a δᵀ; U w and the triangle of a aᵀ.
    return Flops(2 * product(T, C, K), product(T, K, K) + symmetric(K, T))


def update_posterior_backward(K: int, C: int, T: int, Q: int) -> Flops:
    # Rᵀw again for δ, R̄'δ, R̄'ᵀa, R δ̄, w δ̄ᵀ; U w again, Ū'a, U ā, and sym(ā wᵀ), two triangles.
    return Flops(5 * product(T, C, K), 3 * product(T, K, K) + 2 * symmetric(K, T))


def write(K: int, C: int, T: int, Q: int) -> Flops:
    # An update, and of each pattern R z and one solve; R Rᵀ and its factor once, as if later ones cost nothing.
    update = update_posterior(K, C, T, Q)
    solved = symmetric(K, C) + third(K) + 2 * triangular_solve(K, T)
    return Flops(update.codes + product(T, K, C), update.other + solved)


def write_backward(K: int, C: int, T: int, Q: int) -> Flops:
    # That of an update, and of each pattern v = A⁻¹ w̄, Rᵀv and v δᵀ; w (Rᵀv)ᵀ joins w δ̄ᵀ. R Rᵀ is factored again.
    update = update_posterior_backward(K, C, T, Q)
    solved = symmetric(K, C) + third(K) + 2 * triangular_solve(K, T)
    return Flops(update.codes + 2 * product(T, C, K), update.other + solved)


def solve_addressing(K: int, C: int, T: int, Q: int) -> Flops:
    # R Rᵀ or RᵀR, whichever is smaller, its factor, R z, and two triangular solves a query; with more queries than
    # the other side is long, the solves are done once for R.
    small, large = min(K, C), max(K, C)
    solved = symmetric(small, large) + third(small) + 2 * triangular_solve(small, min(Q, large))
    return Flops(product(Q, K, C), solved)


def factor_addressing(K: int, C: int, T: int, Q: int) -> Flops:
    return Flops(0, symmetric(K, C) + third(K))


def solve_factored(K: int, C: int, T: int, Q: int) -> Flops:
    return Flops(product(Q, K, C), 2 * triangular_solve(K, min(Q, C)))


def read(K: int, C: int, T: int, Q: int) -> Flops:
    # Addressing and Rᵀw. However many the iterations, they are one linear map of the weights.
    addressed = solve_addressing(K, C, T, Q)
    return Flops(addressed.codes + product(Q, C, min(K, C)), addressed.other)


def read_backward(K: int, C: int, T: int, Q: int) -> Flops:
    # R z and a solve again; R times the cotangent of the values, another solve, its Rᵀ, and two outer products for R̄;
    # the cotangent of R Rᵀ is a sum over queries, and goes into R̄ by one product with R.
    addressed = solve_addressing(K, C, T, Q)
    small, large = min(K, C), max(K, C)
    solved = 2 * triangular_solve(small, min(Q, large)) + symmetric(small, min(Q, large)) + product(small, large, small)
    return Flops(addressed.codes + 4 * product(Q, C, K), addressed.other + solved)


def kl_memory(K: int, C: int, T: int, Q: int) -> Flops:
    # Both factors, L0⁻¹ L and L0⁻¹ (R − R0).
    return Flops(0, 3 * third(K) + triangular_solve(K, C))


def kl_memory_backward(K: int, C: int, T: int, Q: int) -> Flops:
    # Both factors and both inverses, U0⁻¹ L half of whose terms are zero, its square; E = U0⁻¹ (R − R0) and E Eᵀ.
    gap = product(K, K, K) // 2 + symmetric(K, K)
    return Flops(0, 6 * third(K) + gap + 2 * triangular_solve(K, C) + symmetric(K, C))


def logdet(K: int, C: int, T: int, Q: int) -> Flops:
    return Flops(0, third(K))


def logdet_backward(K: int, C: int, T: int, Q: int) -> Flops:
    # The factor, its inverse, and that one's square.
    return Flops(0, 3 * third(K))


OPERATORS: dict[str, Callable[[int, int, int, int], Flops]] = {
    function.__name__: function
    for function in (
        *(update_posterior, update_posterior_backward, write, write_backward, read, read_backward),
        *(solve_addressing, factor_addressing, solve_factored),
        *(kl_memory, kl_memory_backward, logdet, logdet_backward),
    )
}


# ---- the bound -----------------------------------------------------------------------------------------------------


def bound(operator: str, preset: Preset, batch: int, queries: int, precision: str = "ieee") -> Bound:
    """The least time of one call: that of whichever unit has most to do while all work at once."""
    moved = bytes_to_move(operator, inputs(operator, preset, batch, queries))
    codes, other = (batch * count for count in OPERATORS[operator](preset.K, preset.C, preset.T, queries))
    times = {"memory": moved / BANDWIDTH}
    if precision == "ieee":
        times["float32"] = (codes + other) / FLOAT32
    else:
        times |= {"float32": other / FLOAT32, "tensor cores": codes / TENSOR[precision]}
    by = max(times, key=times.__getitem__)
    return Bound(moved, Flops(codes, other), times[by], by)


HEADERS = (
    *("operator", "preset", "MB", "Mflop codes", "Mflop other", "flop/byte"),
    *("µs ieee", "bound by", "µs tf32", "bound by"),
)


def row(operator: str, preset: Preset, batch: int, queries: int) -> tuple[str, ...]:
    ieee, tf32 = (bound(operator, preset, batch, queries, precision) for precision in ("ieee", "tf32"))
    intensity = sum(ieee.flops) / ieee.bytes
    counts = (ieee.bytes / 1e6, ieee.flops.codes / 1e6, ieee.flops.other / 1e6)
    last = (f"{1e6 * tf32.seconds:.2f}", tf32.by) if ieee.flops.codes else ("–", "–")
    numbers = (f"{count:,.1f}" for count in counts)
    return (operator, preset.name, *numbers, f"{intensity:.1f}", f"{1e6 * ieee.seconds:.2f}", ieee.by, *last)


def bound_table(batch: int, queries: int) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Title, headers, rows."""
    title = (
        f"A BOUND for one H100 SXM, not a measurement: no kernel is faster than this with cold caches. B = {batch}, "
        f"Q = {queries}, float32. {BANDWIDTH / 1e12} TB/s, {FLOAT32 / 1e12:.0f} TFLOP/s float32, "
        f"{TENSOR['tf32'] / 1e12:.0f} TFLOP/s TF32 (dense) by NVIDIA's H100 datasheet."
    )
    return title, HEADERS, [row(name, preset, batch, queries) for preset in PRESETS.values() for name in OPERATORS]
