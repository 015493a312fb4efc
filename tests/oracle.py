"""What the tests hold the package to: the equations in float64 NumPy, derived tolerances, problems, and hostile memory.

The oracles work on one memory at a time, in the plainest form there is, and call nothing of the package.
Letters as in :mod:`fastkm.state`; ``squared`` is the squared-Gram solve of the released DeepMind code.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastkm
from fastkm import MemoryState
from fastkm._runtime import dispatch

# ---------------------------------------------------------------------------------------------- one memory, float64


def ridge_weights(R, z, ridge, squared=False):
    """argmin ‖z − Rᵀw‖² + λ‖w‖² as one stacked least-squares problem; squared: argmin ‖Rz − Gw‖² + λ‖w‖²."""
    design, target = (R @ R.T, R @ z) if squared else (R.T, z)
    rows = R.shape[0]
    stacked = np.concatenate([design, math.sqrt(ridge) * np.eye(rows)])
    return np.linalg.lstsq(stacked, np.concatenate([target, np.zeros(rows)]), rcond=None)[0]


def solve(R, Z, ridge, squared=False):
    return {"weights": np.stack([ridge_weights(R, z, ridge, squared) for z in Z])}


def rank_one(R, U, w, z, noise):
    """One pattern: new R and U, innovation variance, KL of the step, log-likelihood."""
    code_size = len(z)
    a, delta = U @ w, z - R.T @ w
    s = w @ a + noise
    beta = w @ a / s
    kl = 0.5 * (-code_size * beta + beta / s * delta @ delta - code_size * np.log1p(-beta))
    log_likelihood = -0.5 * (code_size * math.log(2 * math.pi * s) + delta @ delta / s)
    return R + np.outer(a, delta) / s, U - np.outer(a, a) / s, s, kl, log_likelihood


def update(R, U, W, Z, noise, mask):
    s, kl, log_evidence = noise.copy(), np.zeros(len(W)), 0.0
    for t in np.flatnonzero(mask):
        R, U, s[t], kl[t], log_likelihood = rank_one(R, U, W[t], Z[t], noise[t])
        log_evidence += log_likelihood
    return {"mean": R, "cov": U, "innovation_var": s, "kl": kl, "log_evidence": np.asarray(log_evidence)}


def normal_equations(R, U, W, Z, noise, mask):
    """Information form: precisions and information add; only the posterior, in no order at all."""
    gram = W[mask].T / noise[mask]  # Wᵀ Σ⁻¹
    prior_precision = np.linalg.inv(U)
    cov = np.linalg.inv(prior_precision + gram @ W[mask])
    return {"mean": cov @ (prior_precision @ R + gram @ Z[mask]), "cov": cov}


def write(R, U, Z, noise, ridge, mask, num_opt_iters=1, squared=False):
    weights, s, kl = np.zeros((len(Z), R.shape[0])), noise.copy(), np.zeros(len(Z))
    for t in np.flatnonzero(mask):
        candidate = R
        for _ in range(num_opt_iters):
            weights[t] = ridge_weights(candidate, Z[t], ridge, squared)
            candidate, cov, s[t], kl[t], _ = rank_one(R, U, weights[t], Z[t], noise[t])
        R, U = candidate, cov
    return {"mean": R, "cov": U, "weights": weights, "innovation_var": s, "kl": kl}


def read(R, Z, ridge, num_iters, squared=False):
    """Every read-out is the next query."""
    for _ in range(num_iters):
        weights = solve(R, Z, ridge, squared)["weights"]
        Z = weights @ R
    return {"values": Z, "weights": weights}


def attractor_read(R, U, Z, noise, ridge, clean, num_iters, weight_var, tol):
    """Each query on its own; ``clean`` takes one code."""
    values, weights, energy, taken = [], [], [], []
    for x in Z:
        track, last = [], None
        for i in range(num_iters):
            w = ridge_weights(R, x, ridge)
            now = R.T @ w
            track.append(pattern_energy(x, w, R, U, noise, ridge, weight_var))
            arrived = last is not None and tol is not None and math.sqrt(np.mean((now - last) ** 2)) <= tol
            last = now
            if arrived or i + 1 == num_iters:
                break
            x = clean(now)
        values.append(last), weights.append(w), taken.append(len(track))
        energy.append(track + [track[-1]] * (num_iters - len(track)))
    fields = {"values": values, "weights": weights, "energy": energy, "num_iters": taken}
    return {name: np.asarray(field) for name, field in fields.items()}


def pattern_energy(x, w, R, U, noise, ridge, weight_var):
    """−⟨ln p(x | w, M)⟩ under q(M) q(w), column by column, plus the cost of w."""
    prior_var, total = noise / ridge, 0.0
    for c in range(len(x)):
        expected = (x[c] - R[:, c] @ w) ** 2 + w @ U @ w + weight_var * (R[:, c] @ R[:, c] + np.trace(U))
        total += 0.5 * (math.log(2 * math.pi * noise) + expected / noise)
    for k in range(len(w)):
        if weight_var > 0:
            ratio = weight_var / prior_var
            total += 0.5 * (ratio + w[k] ** 2 / prior_var - 1 - math.log(ratio))
        else:
            total += 0.5 * (math.log(2 * math.pi * prior_var) + w[k] ** 2 / prior_var)
    return total


def kl_columns(R, U, R0, U0):
    """KL between two memories as the sum over columns of the KL between two Gaussians."""
    precision = np.linalg.inv(U0)
    determinants = np.linalg.slogdet(U0)[1] - np.linalg.slogdet(U)[1]
    shift = R - R0
    return sum(
        0.5 * (np.trace(precision @ U) - len(U) + determinants + shift[:, c] @ precision @ shift[:, c])
        for c in range(R.shape[1])
    )


def batched(oracle, *arguments, **options):
    """Run an oracle memory by memory on torch arguments in float64; a float is the same for every memory."""
    arrays = [x.numpy() if x.dtype == torch.bool else x.double().numpy() for x in arguments]
    results = [oracle(*row, **options) for row in zip(*arrays, strict=True)]
    return {name: torch.from_numpy(np.stack([r[name] for r in results])) for name in results[0]}


# -------------------------------------------------------------------------------------------------------- tolerances

# Two float64 algorithms for one quantity agree to 1e-12 of its largest entry; in units of rounding, for any dtype:
ROUNDINGS = 1e-12 / torch.finfo(torch.float64).eps


def flat(result) -> dict[str, Tensor]:
    """The tensors of a result by name; a nested state is opened."""
    if isinstance(result, Tensor):
        return {"weights" if result.dim() == 3 else "kl_memory": result}
    fields = {}
    for name, value in result._asdict().items():
        fields |= flat(value) if isinstance(value, tuple) else {name: value}
    return fields


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def error(actual: Tensor, truth: Tensor) -> float:
    assert actual.shape == truth.shape, f"shape {list(actual.shape)}, expected {list(truth.shape)}"
    return largest(actual.double() - truth.double())


def assert_close(actual: Tensor, truth: Tensor, name: str = "", *, scale: float = 0.0) -> None:
    """Within ROUNDINGS of the largest entry, or of ``scale`` where the entries are small differences of such terms."""
    assert actual.is_floating_point(), f"{name}: {actual.dtype}"
    bound = ROUNDINGS * torch.finfo(actual.dtype).eps * max(largest(truth), scale)
    assert error(actual, truth) <= bound, f"{name}: error {error(actual, truth):.3g} exceeds {bound:.3g}"


def assert_result(
    actual, truth: dict[str, Tensor], own_errors: dict[str, float] | None = None, times: Mapping[str, float] = {}
) -> None:
    """Hold every field of a result to the truth: by rounding, or to twice the reference's ``own_errors``.

    With those the bound is 2 (own error + eps · max|truth|), or ``times`` instead of 2 where it names the field.
    Integers must be the same. A KL is a difference of terms of size C, which is the least its rounding is measured in.
    """
    actual = flat(actual)
    for name, expected in truth.items():
        got, scale = actual[name], float(actual["mean"].shape[-1]) if name == "kl" else 0.0
        if not got.is_floating_point():
            assert torch.equal(got, expected), name
        elif own_errors is None:
            assert_close(got, expected, name, scale=scale)
        else:
            bound = times.get(name, 2) * (own_errors[name] + torch.finfo(got.dtype).eps * max(largest(expected), scale))
            assert error(got, expected) <= bound, f"{name}: error {error(got, expected):.3g} exceeds {bound:.3g}"


def judge(
    run, p: "Problem", truth: dict[str, Tensor], backend: str, *, draws: int = 8, times: Mapping[str, float] = {}
) -> None:
    """Run a backend on a problem, ``run(p, backend)``, and hold it to the truth.

    In float32 another backend than the reference may be at most twice as wrong as the reference is in float32, or
    ``times`` as wrong in a field that it names. In
    float64 all are held to 1e-12: a truth in float64 is itself no better, so it cannot judge a factor of two.
    """
    if backend == "reference" or p.state.mean.dtype == torch.float64:
        assert_result(run(p, backend), truth)
    else:
        assert_result(run(p, backend), truth, reference_errors(run, p, truth, draws), times)


def reference_errors(run, p: "Problem", truth: dict[str, Tensor], draws: int) -> dict[str, float]:
    """The reference's own errors: the worst of several draws of its rounding.

    The order of a memory's rows means nothing, so each draw is the same problem with its rows in another order. One
    draw alone can be right by luck where the problem is ill-conditioned.
    """
    rows, errors = p.state.mean.shape[1], dict.fromkeys(truth, 0.0)
    for seed in range(draws):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)) if seed else torch.arange(rows)
        mean, cov = p.state
        state = MemoryState(mean[:, order], cov[:, order][:, :, order])
        result = flat(run(p._replace(state=state, weights=p.weights[:, :, order]), "reference"))
        for name, expected in truth.items():
            if name in ("mean", "cov"):
                expected = expected[:, order]
            if name in ("cov", "weights"):
                expected = expected[:, :, order]
            errors[name] = max(errors[name], error(result[name], expected))
    return errors


def equal(a, b) -> bool:
    """The same bits, NaN included."""
    pairs = list(zip(flat(a).values(), flat(b).values(), strict=True))
    return all(torch.equal(x, y) or torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) for x, y in pairs)


# ----------------------------------------------------------------------------------------------------------- problems


class Problem(NamedTuple):
    """Arguments for any function of the package, of agreeing sizes."""

    state: MemoryState
    weights: Tensor  # [B, T, K]
    values: Tensor  # [B, T, C]
    queries: Tensor  # [B, Q, C]
    noise_var: Tensor  # [B, T]
    ridge: Tensor  # [B]
    mask: Tensor | None  # [B, T]


# B, T, Q, K, C: one of everything, T > K, C < K, T > C, rows beside the vector widths, chunk boundaries. Many memories,
# because the worst error of a few is luck and the worst of many is a property of the algorithm.
SHAPES = [
    (1, 1, 1, 1, 1),
    (16, 3, 4, 5, 4),
    (15, 9, 2, 4, 7),
    (16, 5, 3, 13, 6),
    (16, 17, 5, 8, 16),
    (17, 2, 9, 3, 40),
    (8, 33, 6, 31, 20),
    (8, 70, 3, 17, 9),
    (16, 1, 1, 33, 1),
]
EMPTY_SHAPES = [(0, 3, 2, 4, 5), (2, 0, 2, 4, 5), (2, 3, 0, 4, 5), (2, 3, 2, 0, 5), (2, 3, 2, 4, 0)]


def problem(B, T, Q, K, C, dtype=torch.float64, *, seed=0, masked=False) -> Problem:
    """A well-conditioned random problem: cov with eigenvalues of at least ½, σ² and λ between ½ and 1½."""
    generator = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    uniform = functools.partial(torch.rand, generator=generator, dtype=torch.float64)
    root = normal(B, K, K)
    cov = root @ root.mT / max(K, 1) + 0.5 * torch.eye(K, dtype=torch.float64)
    made = (
        normal(B, K, C) / math.sqrt(max(C, 1)),
        (cov + cov.mT) / 2,
        normal(B, T, K) / math.sqrt(max(K, 1)),
        normal(B, T, C),
        normal(B, Q, C),
        0.5 + uniform(B, T),
        0.5 + uniform(B),
    )
    mean, cov, *rest = (x.to(dtype) for x in made)
    return Problem(MemoryState(mean, cov), *rest, uniform(B, T) < 0.6 if masked else None)


def map_tensors(p: Problem, change) -> Problem:
    """The problem with ``change`` applied to every tensor."""
    state = MemoryState(*map(change, p.state))
    return Problem(state, *(None if x is None else change(x) for x in p[1:]))


def tensors(p: Problem) -> list[Tensor]:
    return [x for x in (*p.state, *p[1:]) if x is not None]


def runs_on_cpu(operation: str, backend: str) -> bool:
    """Whether the backend has the operation at all, and for tensors on the CPU."""
    capability = dispatch.CAPABILITIES[operation].get(backend)
    return capability is not None and (not capability.devices or "cpu" in capability.devices)


OPERATIONS = ("solve_addressing", "update_posterior", "write", "read", "attractor_read", "kl_memory")


def call(operation: str, p: Problem, backend: str | None, **options):
    """Run an operation of the package on a problem."""
    if operation == "solve_addressing":
        return fastkm.solve_addressing(p.state.mean, p.queries, p.ridge, backend=backend, **options)
    if operation == "update_posterior":
        return fastkm.update_posterior(
            p.state, p.weights, p.values, p.noise_var, mask=p.mask, backend=backend, **options
        )
    if operation == "write":
        return fastkm.write(p.state, p.values, p.noise_var, p.ridge, mask=p.mask, backend=backend, **options)
    if operation == "read":
        options = {"num_iters": 3, **options}
        return fastkm.read(p.state.mean, p.queries, p.ridge, backend=backend, **options)
    if operation == "attractor_read":
        options = {"clean": torch.tanh, "num_iters": 3, **options}
        return fastkm.attractor_read(p.state, p.queries, p.ridge, p.ridge, backend=backend, **options)
    prior = MemoryState(p.state.mean * 0.5, p.state.cov * 1.5)
    return fastkm.kl_memory(p.state, prior, backend=backend, **options)


# ------------------------------------------------------------------------------------------------------ hostile memory

LAYOUTS = ("displaced", "strided", "transposed", "batch_last")


def poisoned(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` as a view into storage that is NaN (or True) everywhere else.

    ``displaced`` starts off any vector boundary, ``strided`` has a gap after every entry of every axis, ``transposed``
    has its last two axes exchanged in memory, ``batch_last`` its first axis innermost.
    """
    fill = math.nan if x.is_floating_point() else True
    order = list(range(x.dim()))
    if layout == "displaced":
        view = torch.full((x.numel() + 14,), fill, dtype=x.dtype)[7 : 7 + x.numel()].view(x.shape)
    else:
        step = 2 if layout == "strided" else 1
        if layout == "transposed" and x.dim() > 1:
            order[-2:] = order[:-3:-1]
        elif layout == "batch_last":
            order = order[1:] + order[:1]
        storage = torch.full([step * x.shape[i] + 3 for i in order], fill, dtype=x.dtype)
        view = storage.permute([order.index(i) for i in range(x.dim())])
        view = view[tuple(slice(1, 1 + step * size, step) for size in x.shape)]
    return view.copy_(x)
