"""The price of exactness on a CPU: the filter beside its loop, its block form, the delta rule and softmax attention.

``python -m benchmarks.filtering`` prints the times, forward, and forward with backward; how they grow with T; one step
of decoding beside the time that its bytes need; and the memory of one training step. ``--only`` prints one of these,
or the drift: the error of float32 over T. Candidates that compute the filter are verified against it in float32 before
they are timed.
"""

import argparse
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from benchmarks.timing import keep_freed_memory, pin
from fastkm import MemoryState, filter_posterior
from fastkm.cli.console import markdown_table
from fastkm.filtering.reference import filter_sequential
from fastkm.testing.peak import resident
from fastkm.testing.timing import clock, time_in_turn

PARTS = ("times", "slope", "step", "peak", "drift")
SHAPES = ((16, 1024, 64), (64, 1024, 64), (16, 1024, 128), (16, 4096, 128))
NOISE = 0.1
BLOCK, DELTA = 64, 64  # chunks of the forms in PyTorch: the fastest of 16, 32, 64 and 128 at 16 × 1,024 × 64


class Inputs(NamedTuple):
    keys: Tensor  # [B, T, K], of length 1
    values: Tensor  # [B, T, K]
    queries: Tensor  # [B, T, K]
    cotangent: Tensor  # [B, T, K]


def draw(heads: int, steps: int, size: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    keys, values, queries, cotangent = (torch.randn(heads, steps, size, generator=generator) for _ in range(4))
    return Inputs(normalize(keys, dim=-1), values, normalize(queries, dim=-1), cotangent)


def prior(keys: Tensor, values: Tensor) -> MemoryState:
    B, _, K = keys.shape
    return MemoryState(keys.new_zeros(B, K, values.shape[-1]), torch.eye(K).repeat(B, 1, 1))


# ---- candidates: of keys, values and queries, the values that are read, and their variances where there are any -----


def native(k: Tensor, v: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    made = filter_posterior(prior(k, v), k, v, q, NOISE, backend="native")
    return made.values, made.variance


def step_loop(k: Tensor, v: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    return filter_sequential(*prior(k, v), k, v, q, k.new_full(k.shape[:2], NOISE))[2:4]


def block_step(
    mean: Tensor, cov: Tensor, w: Tensor, z: Tensor, x: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t = w.shape[1]
    projected = torch.cat([w, x], 1) @ cov
    crossed = projected @ w.mT  # S above H
    lower = torch.linalg.cholesky_ex(crossed[:, :t] + noise).L
    gain = torch.linalg.solve_triangular(lower, crossed[:, t:].mT, upper=False).mT.tril()
    error = torch.linalg.solve_triangular(lower, torch.baddbmm(z, w, mean, alpha=-1), upper=False)
    variance = (projected[:, t:] * x).sum(-1) - gain.square().sum(-1)
    values = torch.baddbmm(x @ mean, gain, error)
    whitened = torch.linalg.solve_triangular(lower, projected[:, :t], upper=False)
    new_mean = torch.baddbmm(mean, whitened.mT, error)
    return values, variance, new_mean, torch.baddbmm(cov, whitened.mT, whitened, alpha=-1)


def block_form(
    k: Tensor, v: Tensor, q: Tensor, size: int = BLOCK, step: Callable[..., tuple[Tensor, ...]] = block_step
) -> tuple[Tensor, Tensor]:
    """Chunks with one Cholesky factor each, (F4) to (F9) of docs/math/filtering.md, without decay or checks."""
    (mean, cov), made = prior(k, v), []
    noise = NOISE * torch.eye(size)
    for w, z, x in zip(k.split(size, 1), v.split(size, 1), q.split(size, 1), strict=True):
        t = w.shape[1]
        values, variance, mean, cov = step(mean, cov, w, z, x, noise[:t, :t])
        made.append((values, variance))
    values, variances = zip(*made, strict=True)
    return torch.cat(values, 1), torch.cat(variances, 1)


def delta_loop(k: Tensor, v: Tensor, q: Tensor) -> tuple[Tensor]:
    """S ← S + β k (v − Sᵀk)ᵀ, o = Sᵀq with β = 1/(1 + σ²): the filter whose covariance never changes."""
    beta, state, reads = 1 / (1 + NOISE), k.new_zeros(k.shape[0], k.shape[2], v.shape[2]), []
    for w, z, x in zip(k.split(1, 1), v.split(1, 1), q.split(1, 1), strict=True):
        state = state + beta * w.mT @ (z - w @ state)
        reads.append(x @ state)
    return (torch.cat(reads, 1),)


def delta_chunks(k: Tensor, v: Tensor, q: Tensor, size: int = DELTA) -> tuple[Tensor]:
    """The same in chunks: (I + β tril(K Kᵀ, −1)) D = β (V − K S), o = Q S + tril(Q Kᵀ) D, S ← S + Kᵀ D."""
    beta, state, reads = 1 / (1 + NOISE), k.new_zeros(k.shape[0], k.shape[2], v.shape[2]), []
    for w, z, x in zip(k.split(size, 1), v.split(size, 1), q.split(size, 1), strict=True):
        crossed = torch.cat([w, x], 1) @ w.mT
        t = w.shape[1]
        system = beta * crossed[:, :t].tril(-1) + torch.eye(t)
        change = torch.linalg.solve_triangular(
            system, beta * torch.baddbmm(z, w, state, alpha=-1), upper=False, unitriangular=True
        )
        reads.append(torch.baddbmm(x @ state, crossed[:, t:].tril(), change))
        state = torch.baddbmm(state, w.mT, change)
    return (torch.cat(reads, 1),)


def attention(k: Tensor, v: Tensor, q: Tensor) -> tuple[Tensor]:
    return (scaled_dot_product_attention(q, k, v, is_causal=True),)


Candidate = Callable[..., tuple[Tensor, ...]]
FILTER = "filter_posterior"
CANDIDATES: dict[str, Candidate] = {
    FILTER: native,
    "step loop": step_loop,
    "block form": block_form,
    "delta rule in chunks": delta_chunks,
    "softmax attention": attention,
}
COMPILED = "block form, compiled"
EXACT = ("step loop", "block form", COMPILED)


def with_gradient(form: Candidate) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """Forward and backward, of the values that are read, by keys, values and queries."""

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        return torch.autograd.grad(form(*leaves)[0], leaves, inputs.cotangent)

    return run


def verify(candidates: Mapping[str, Candidate], inputs: Inputs) -> None:
    """Everything that claims to be exact is the filter in float32, and the delta rule in chunks is its loop."""
    few = Inputs(*(x[:2, :150] for x in inputs))
    exact = native(*few[:3])
    for name in EXACT:
        if name in candidates:
            for x, y in zip(candidates[name](*few[:3]), exact, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(delta_chunks(*few[:3]), delta_loop(*few[:3]), rtol=1e-4, atol=1e-4)


def least_operations(heads: int, steps: int, size: int, chunk: int = 32) -> int:
    """Those of docs/math/filtering.md with K = C: 4 K² + 6 K C + 4 c (K + C) a step; the variance is within them."""
    return heads * steps * (10 * size**2 + 8 * chunk * size)


def product_rate() -> float:
    """Operations a second of torch's own product, the best of a few sizes."""
    rates = []
    for n in (512, 1024, 2048):
        a, b = torch.randn(n, n), torch.randn(n, n)
        torch.mm(a, b)
        rates.append(max(2 * n**3 / clock(lambda a=a, b=b: torch.mm(a, b), 3) for _ in range(3)))
    return max(rates)


def rows_of(shape: tuple[int, int, int], seconds: float, compiles: bool) -> list[tuple[str, ...]]:
    inputs = draw(*shape)
    candidates = dict(CANDIDATES)
    if compiles:  # a chunk, not the loop over chunks, which would compile for minutes
        candidates[COMPILED] = partial(block_form, step=torch.compile(block_step, dynamic=False))
    if shape[1] > 1024:
        del candidates["step loop"]
    verify(candidates, inputs)
    bound, rows = least_operations(*shape) / product_rate(), []
    forward = {name: lambda form=form: form(*inputs[:3]) for name, form in candidates.items()}
    both = {name: partial(with_gradient(form), inputs) for name, form in candidates.items()}
    if compiles:
        forward[COMPILED](), both[COMPILED]()  # the timer takes a slow first call for a sample
    for kind, calls in (("forward", forward), ("forward and backward", both)):
        timings = time_in_turn(calls, seconds)
        for name, timing in timings.items():
            times = timing.median / timings[FILTER].median
            share = f"{100 * bound / timing.median:.0f} %" if (name, kind) == (FILTER, "forward") else ""
            spread = f"{1e3 * timing.lower:.1f} – {1e3 * timing.upper:.1f}"
            where = " × ".join(map(str, shape))
            rows.append((where, kind, name, f"{1e3 * timing.median:.1f}", spread, f"{times:.2f}", share))
    return rows


HEADERS = ("heads × T × K", "", "candidate", "ms", "quartiles", "of the filter's", "of the product's rate")


# ---- how time grows with T, and one step -----------------------------------------------------------------------------


def slope_rows(heads: int, size: int, seconds: float, few: int = 1024, many: int = 4096) -> list[tuple[str, ...]]:
    """The exponent p of time ∝ T^p between two lengths."""
    short, long = draw(heads, few, size), draw(heads, many, size)
    rows = []
    for kind, run in (("forward", lambda x: native(*x[:3])), ("forward and backward", with_gradient(native))):
        timings = time_in_turn({"few": partial(run, short), "many": partial(run, long)}, seconds)
        slope = math.log(timings["many"].median / timings["few"].median) / math.log(many / few)
        rows.append((f"{heads} × {few:,} … {many:,} × {size}", kind, f"{slope:.3f}"))
    return rows


def step_rows(heads: int, size: int, seconds: float) -> list[tuple[str, ...]]:
    """One step of decoding, as the function and as the operator, beside a copy of the memories that it reads and
    writes."""
    inputs = draw(heads, 1, size)
    state = prior(inputs.keys, inputs.values)
    memory = torch.cat([state.mean, state.cov], -1)
    noise, prior_var = torch.full((heads, 1), NOISE), torch.ones(heads)
    given = inputs.keys, inputs.values, inputs.queries
    operator = torch.ops.fastkm.filter_posterior
    candidates = {
        "copy of the bytes": memory.clone,
        "operator": lambda: operator(*state, *given, noise, None, prior_var, None, False, None, 0),
        "function": lambda: filter_posterior(state, *given, NOISE, backend="native"),
    }
    timings = time_in_turn(candidates, seconds)
    bound, where = timings["copy of the bytes"].median, f"{heads} × 1 × {size}"
    return [(where, name, f"{1e6 * t.median:.0f}", f"{t.median / bound:.2f}") for name, t in timings.items()]


# ---- drift: the error of float32 over T ------------------------------------------------------------------------------


def drift_rows(lengths: tuple[int, ...] = (256, 1024, 4096, 16384, 65536)) -> list[tuple[str, ...]]:
    """The largest error of the last 256 reads, their variances and the state, relative to the largest entry."""
    rows = []
    for law in ({}, {"retention": 0.99}, {"forgetting": 0.99}):
        inputs = draw(4, lengths[-1], 32)
        for T in lengths:
            part = [x[:, :T] for x in inputs[:3]]
            found = []
            for dtype in (torch.float32, torch.float64):
                k, v, q = (x.to(dtype) for x in part)
                state = MemoryState(*(x.to(dtype) for x in prior(*part[:2])))
                made = filter_posterior(state, k, v, q, NOISE, **law, backend="native")
                found.append((made.values[:, -256:], made.variance[:, -256:], *made.state))
            errors = ((x - y).abs().max() / y.abs().max() for x, y in zip(*found, strict=True))
            rows.append((" ".join(f"{name} {x}" for name, x in law.items()), f"{T:,}", *(f"{x:.1e}" for x in errors)))
    return rows


# ---- memory of a training step, each in a process of its own --------------------------------------------------------


def print_peak(name: str, shape: tuple[int, int, int]) -> None:
    run = with_gradient(CANDIDATES[name])
    run(draw(1, 64, 16))  # loads what the first call loads
    inputs = draw(*shape)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = resident("VmRSS")
    run(inputs)
    print(resident("VmHWM") - before)


def peak_rows(shape: tuple[int, int, int]) -> list[tuple[str, ...]]:
    peaks = {}
    for name in ("step loop", "block form", FILTER):
        command = [sys.executable, "-m", "benchmarks.filtering", "--peak-of", name, "--shape", *map(str, shape)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[name] = int(done.stdout)
    where, loop = " × ".join(map(str, shape)), peaks["step loop"]
    return [(where, name, f"{peak / 2**20:,.0f}", f"{peak / loop:.3f}") for name, peak in peaks.items()]


def print_part(part: str, shapes: list[tuple[int, int, int]], seconds: float, compiles: bool) -> None:
    if part == "times":
        for shape in shapes:
            print(markdown_table(HEADERS, rows_of(shape, seconds, compiles)), flush=True)
    elif part == "slope":
        rows = [row for size in (64, 128) for row in slope_rows(16, size, seconds)]
        print(markdown_table(("heads × T × K", "", "time ∝ T^"), rows), flush=True)
    elif part == "step":
        rows = [row for size in (64, 128) for row in step_rows(64, size, seconds / 4)]
        print(markdown_table(("heads × T × K", "", "µs", "of the copy's"), rows), flush=True)
    elif part == "peak":
        headers = ("heads × T × K", "candidate", "MB at the peak of a training step", "of the loop's")
        print(markdown_table(headers, peak_rows(shapes[0])), flush=True)
    else:
        print(markdown_table(("decay", "T", "values", "variance", "mean", "cov"), drift_rows()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.filtering", description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20, help="for each half of each shape (default: 20)")
    parser.add_argument("--shape", type=int, nargs=3, action="append", metavar=("HEADS", "T", "K"))
    parser.add_argument("--eager", action="store_true", help="without the compiled block form, which compiles first")
    parser.add_argument("--only", choices=PARTS, help="one part; without it all but the drift")
    parser.add_argument("--peak-of", choices=CANDIDATES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes = [tuple(shape) for shape in options.shape or SHAPES]
    threads = pin(options.threads)
    if options.peak_of:
        return print_peak(options.peak_of, shapes[0])
    print(f"Threads: {threads}. Freed memory: {keep_freed_memory()}. Product: {product_rate() / 1e9:.0f} Gflop/s.\n")
    for part in [options.only] if options.only else PARTS[:-1]:
        print_part(part, shapes, options.seconds, not options.eager)
    return None


if __name__ == "__main__":
    main()
