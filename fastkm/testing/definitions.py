"""What each operation must compute: its definition, and a second form that shares no code with it.

Every function takes an episode and returns the fields of the result by name, in the dtype of the episode. In float64
the definition is the truth, and the gap between the two forms is the rounding of float64.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from fastkm._runtime.guards import DTYPES
from fastkm.addressing import reference as addressing
from fastkm.filtering import reference as filtering
from fastkm.matrix_normal import reference as matrix_normal
from fastkm.posterior import reference as posterior
from fastkm.reading import reference as reading
from fastkm.removal import reference as removal
from fastkm.square_root import reference as square_root
from fastkm.state import SquareRootState
from fastkm.testing.episodes import Episode
from fastkm.writing import reference as writing

Result = dict[str, Tensor]
WEIGHT_VAR = 0.1  # σw² of the attractor read's energy


# Addressing and reading, with the solve as an argument: the Cholesky solve in K, and the dual one in C.


def solve_dual(mean: Tensor, queries: Tensor, ridge: Tensor) -> Tensor:
    """``w = R (RᵀR + λI_C)⁻¹ z``."""
    matrix = mean.mT @ mean + torch.diag_embed(ridge.unsqueeze(-1).expand(-1, mean.shape[-1]))
    return (mean @ torch.cholesky_solve(queries.mT, torch.linalg.cholesky(matrix))).mT


def read_dual(e: Episode) -> Result:
    queries = e.queries
    for _ in range(e.num_iters):
        weights = solve_dual(e.written.mean, queries, e.ridge)
        queries = weights @ e.written.mean
    return {"values": queries, "weights": weights}


def solve_primal(mean: Tensor, queries: Tensor, ridge: Tensor) -> Tensor:
    return addressing.solve_addressing(mean, queries, ridge, False)[0]


def address_primal(e: Episode) -> Result:
    return {"weights": solve_primal(e.written.mean, e.queries, e.ridge)}


def address_dual(e: Episode) -> Result:
    return {"weights": solve_dual(e.written.mean, e.queries, e.ridge)}


def pseudoinverse_primal(e: Episode) -> Result:
    """Rᵀ (RRᵀ + λI)⁻¹, a row for each unit code."""
    codes = torch.eye(e.written.mean.shape[-1]).to(e.written.mean).expand(len(e.ridge), -1, -1)
    return {"pseudoinverse": solve_primal(e.written.mean, codes, e.ridge)}


def pseudoinverse_dual(e: Episode) -> Result:
    codes = torch.eye(e.written.mean.shape[-1]).to(e.written.mean).expand(len(e.ridge), -1, -1)
    return {"pseudoinverse": solve_dual(e.written.mean, codes, e.ridge)}


def attractor_loop(e: Episode, solve: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Result:
    (mean, cov), code, energies = e.written, e.queries, []
    noise, second = e.noise_var[:, :1], e.written.mean @ e.written.mean.mT + e.queries.shape[-1] * e.written.cov
    for _ in range(e.num_iters):
        weights = solve(mean, code, e.ridge)
        values = weights @ mean
        squared = (code - values).square().sum(-1) + code.shape[-1] * torch.einsum(
            "bqk,bkl,bql->bq", weights, cov, weights
        )
        squared = squared + WEIGHT_VAR * torch.einsum("bkk->b", second).unsqueeze(-1)
        prior_std = (noise / e.ridge.unsqueeze(-1)).sqrt().unsqueeze(-1)  # [B, 1, 1]
        cost = kl_divergence(Normal(weights, math.sqrt(WEIGHT_VAR)), Normal(0 * prior_std, prior_std)).sum(-1)
        energies.append((code.shape[-1] * (2 * math.pi * noise).log() + squared / noise) / 2 + cost)
        code = e.clean(values)
    return {"values": values, "weights": weights, "energy": torch.stack(energies, -1)}


def attractor_primal(e: Episode) -> Result:
    return attractor_loop(e, solve_primal)


def attractor_dual(e: Episode) -> Result:
    return attractor_loop(e, solve_dual)


def read_literal(e: Episode) -> Result:
    values, weights, _ = reading.read_literal(e.written.mean, e.queries, e.ridge, e.num_iters, False)
    return {"values": values, "weights": weights}


# Updating: pattern by pattern, and by the normal equations.

UPDATE = ("mean", "cov", "innovation_var", "kl", "log_evidence")


def update_one_by_one(e: Episode) -> Result:
    (mean, cov), variances, energies = e.prior, [], []
    for w, z, noise in zip(e.weights.split(1, 1), e.values.split(1, 1), e.noise_var.split(1, 1), strict=True):
        delta = z - w @ mean
        variances.append((w @ cov @ w.mT).flatten(1))
        mean, cov, s = posterior.update_sequential(mean, cov, w, z, noise)
        energies.append(delta.square().sum(-1) / s)
    explained = torch.cat(variances, 1)
    gains = posterior.information(explained, e.noise_var, torch.cat(energies, 1), e.values.shape[-1], None)
    return dict(zip(UPDATE, (mean, cov, explained + e.noise_var, *gains), strict=True))


def update_normal_equations(e: Episode) -> Result:
    """``U⁻¹ += w wᵀ/σ²``, ``U⁻¹R += w zᵀ/σ²``; the KL of a step is that of the two memories around it."""
    (mean, cov), variances, kls, evidence = e.prior, [], [], torch.zeros_like(e.ridge)
    precision = torch.cholesky_inverse(torch.linalg.cholesky(cov))
    shift = precision @ mean
    for w, z, noise in zip(e.weights.split(1, 1), e.values.split(1, 1), e.noise_var.split(1, 1), strict=True):
        before, s = (mean, cov), (w @ cov @ w.mT).flatten(1) + noise
        evidence = evidence + Normal((w @ mean).squeeze(1), s.sqrt()).log_prob(z.squeeze(1)).sum(-1)
        precision, shift = precision + w.mT @ w / noise.unsqueeze(-1), shift + w.mT @ z / noise.unsqueeze(-1)
        cov = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        mean = cov @ shift
        variances.append(s)
        kls.append(matrix_normal.kl_memory(mean, cov, *before)[0])
    return dict(zip(UPDATE, (mean, cov, torch.cat(variances, 1), torch.stack(kls, 1), evidence), strict=True))


# Removing what an episode has written, and replacing it by the same codes with other weights.

MEMORY = ("mean", "cov")


def new_patterns(e: Episode) -> tuple[Tensor, Tensor]:
    return 0.5 * e.weights.flip(1), 0.5 * e.values


def remove_one_by_one(e: Episode) -> Result:
    return dict(zip(MEMORY, removal.remove_sequential(*e.written, e.weights, e.values, e.noise_var), strict=True))


def replace_one_by_one(e: Episode) -> Result:
    mean, cov, _ = posterior.update_sequential(*e.written, *new_patterns(e), e.noise_var)
    return dict(zip(MEMORY, removal.remove_sequential(mean, cov, e.weights, e.values, e.noise_var), strict=True))


def exchange_normal_equations(e: Episode, *coming: tuple[Tensor, Tensor]) -> Result:
    """``U⁻¹`` and ``U⁻¹R``, less the sums over the patterns that leave, plus those over the new ones."""
    precision = torch.cholesky_inverse(torch.linalg.cholesky(e.written.cov))
    shift = precision @ e.written.mean
    for sign, (w, z) in ((-1, (e.weights, e.values)), *((1, patterns) for patterns in coming)):
        scaled = sign * w.mT / e.noise_var.unsqueeze(1)
        precision, shift = precision + scaled @ w, shift + scaled @ z
    cov = torch.cholesky_inverse(torch.linalg.cholesky((precision + precision.mT) / 2))
    return dict(zip(MEMORY, (cov @ shift, cov), strict=True))


def remove_normal_equations(e: Episode) -> Result:
    return exchange_normal_equations(e)


def replace_normal_equations(e: Episode) -> Result:
    return exchange_normal_equations(e, new_patterns(e))


# The root of the covariance: pattern by pattern, and by the product of all reflections.

SQUARE_ROOT = ("mean", "root")


def square_root_of(e: Episode) -> SquareRootState:
    cov = e.prior.cov if e.prior.cov.dtype in DTYPES else e.prior.cov.float()  # under autocast
    return SquareRootState(e.prior.mean, torch.linalg.cholesky_ex(cov).L)


def update_root_one_by_one(e: Episode) -> Result:
    mean, root, _ = square_root.update_sequential(*square_root_of(e), e.weights, e.values, e.noise_var, None)
    return dict(zip(SQUARE_ROOT, (mean, root), strict=True))


def update_root_by_reflections(e: Episode) -> Result:
    """``B = Π (I − f fᵀ/c)``, ``f = Bᵀ Sᵀ w``, ``S' = S B``; the mean by the gain ``U' Wᵀ/σ²``."""
    mean, root = square_root_of(e)
    turn = torch.eye(root.shape[-1]).to(root).expand_as(root)
    for p, noise in zip((e.weights @ root).split(1, 1), e.noise_var.unsqueeze(-1).split(1, 1), strict=True):
        f = p @ turn
        s = f.square().sum(-1, keepdim=True) + noise
        turn = turn - turn @ f.mT @ f / (s + (s * noise).sqrt())
    root = root @ turn
    gain = root @ (root.mT @ (e.weights.mT / e.noise_var.unsqueeze(1)))
    return dict(zip(SQUARE_ROOT, (mean + gain @ (e.values - e.weights @ mean), root), strict=True))


# Filtering, one step at a time, and by precisions. The queries are the weights in the opposite order; what is learnt is
# kept at a rate of its own at every step.

FILTER = ("mean", "cov", "values", "variance", "innovation_var", "log_evidence")


def filter_queries(e: Episode) -> Tensor:
    return e.weights.flip(1)


def filter_retention(e: Episode) -> Tensor:
    return torch.exp(-0.05 * e.noise_var)


def filter_one_by_one(e: Episode) -> Result:
    inputs = (*e.prior, e.weights, e.values, filter_queries(e), e.noise_var, filter_retention(e), e.ridge)
    return dict(zip(FILTER, filtering.filter_sequential(*inputs), strict=True))


def filter_normal_equations(e: Episode) -> Result:
    """Each step relaxes the moments and then adds ``w wᵀ/σ²`` and ``w zᵀ/σ²`` to their information form."""
    (mean, cov), evidence = e.prior, torch.zeros_like(e.ridge)
    reads: list[Tensor] = []
    variances: list[Tensor] = []
    innovation_vars: list[Tensor] = []
    steps = (e.weights, e.values, filter_queries(e), e.noise_var, filter_retention(e))
    for w, z, q, noise, kept in zip(*(x.split(1, 1) for x in steps), strict=True):
        kept = kept.unsqueeze(-1)
        drift = ((1 - kept**2) * e.ridge[:, None, None]).expand_as(w)
        mean, cov = kept * mean, kept**2 * cov + torch.diag_embed(drift.squeeze(1))
        s = (w @ cov @ w.mT).flatten(1) + noise
        evidence = evidence + Normal((w @ mean).squeeze(1), s.sqrt()).log_prob(z.squeeze(1)).sum(-1)
        before = torch.cholesky_inverse(torch.linalg.cholesky(cov))
        shift = before @ mean + w.mT @ z / noise.unsqueeze(-1)
        cov = torch.cholesky_inverse(torch.linalg.cholesky(before + w.mT @ w / noise.unsqueeze(-1)))
        mean = cov @ shift
        for made, x in zip(
            (reads, variances, innovation_vars), (q @ mean, (q @ cov @ q.mT).flatten(1), s), strict=True
        ):
            made.append(x)
    outputs = (torch.cat(x, 1) for x in (reads, variances, innovation_vars))
    return dict(zip(FILTER, (mean, cov, *outputs, evidence), strict=True))


# Writing, in the literal loop and in Gram space.

WRITE = ("mean", "cov", "weights", "innovation_var", "kl")


def write_literal(e: Episode) -> Result:
    written = writing.write_sequential(*e.prior, e.values, e.noise_var, e.ridge, 1, False, None)
    return dict(zip(WRITE, written[:-1], strict=True))


def write_gram_space(e: Episode) -> Result:
    return dict(zip(WRITE, writing.write_gram_space(*e.prior, e.values, e.noise_var, e.ridge), strict=True))


# Divergences: by Cholesky factors, and by eigenvalues.


def kl_memory_by_eigenvalues(e: Episode) -> Result:
    (mean, cov), (prior_mean, prior_cov) = e.written, e.prior
    precision = torch.cholesky_inverse(torch.linalg.cholesky(prior_cov))
    delta = mean - prior_mean
    growth = torch.linalg.eigvalsh(prior_cov).log().sum(-1) - torch.linalg.eigvalsh(cov).log().sum(-1)
    spread = (precision * cov).sum((-2, -1)) - mean.shape[1] + growth
    return {"value": (mean.shape[-1] * spread + (delta * (precision @ delta)).sum((-2, -1))) / 2}


def kl_memory_of_diagonals(e: Episode) -> Result:
    q, p = (Normal(mean, cov.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-1)) for mean, cov in (e.written, e.prior))
    return {"value": 2 * kl_divergence(q, p).sum((-2, -1))}
