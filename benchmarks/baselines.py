"""What a good PyTorch user would write: the forms that the kernels are held against, apart from the literal loops.

Every form takes the tensors of one operation and returns its fields by name, some of them or all; what it returns is
verified. A ``lean`` form returns the new memory alone and writes in place; the other returns all that the public
function does and can be differentiated.
"""

import torch
from torch import Tensor

from fastkm.posterior.reference import information

# ---- update_posterior ----------------------------------------------------------------------------------------------


def update_block(mean, cov, weights, values, noise_var) -> dict[str, Tensor]:
    """V = W U, V Wᵀ + σ²I = L Lᵀ, G = L⁻¹V, E = L⁻¹(Z − W R); R + GᵀE, U − GᵀG."""
    projected = weights @ cov
    factor = torch.linalg.cholesky(projected @ weights.mT + torch.diag_embed(noise_var))
    gain = torch.linalg.solve_triangular(factor, projected, upper=False)
    error = torch.linalg.solve_triangular(factor, values - weights @ mean, upper=False)
    innovation_var = factor.diagonal(dim1=-2, dim2=-1).square()
    kl, log_evidence = information(innovation_var, noise_var, error, None)
    return {
        "mean": mean + gain.mT @ error,
        "cov": cov - gain.mT @ gain,
        "innovation_var": innovation_var,
        "kl": kl,
        "log_evidence": log_evidence,
    }


def update_block_lean(mean, cov, weights, values, noise_var) -> dict[str, Tensor]:
    """The same with one triangular solve for both, sums inside the products, and nothing but the new memory."""
    projected = weights @ cov
    predictive = projected @ weights.mT
    predictive.diagonal(dim1=-2, dim2=-1).add_(noise_var)
    factor = torch.linalg.cholesky_ex(predictive).L
    error = torch.baddbmm(values, weights, mean, alpha=-1)
    whitened = torch.linalg.solve_triangular(factor, torch.cat((projected, error), -1), upper=False)
    gain, error = whitened.split((cov.shape[-1], mean.shape[-1]), -1)
    return {"mean": torch.baddbmm(mean, gain.mT, error), "cov": torch.baddbmm(cov, gain.mT, gain, alpha=-1)}


def update_normal_gain(mean, cov, weights, values, noise_var) -> dict[str, Tensor]:
    """The Kalman gain from S⁻¹V by ``cholesky_solve``: R + AᵀΔ, U − AᵀV."""
    projected = weights @ cov
    predictive = projected @ weights.mT
    predictive.diagonal(dim1=-2, dim2=-1).add_(noise_var)
    gain = torch.cholesky_solve(projected, torch.linalg.cholesky_ex(predictive).L).mT  # [B, K, T]
    error = torch.baddbmm(values, weights, mean, alpha=-1)
    return {"mean": torch.baddbmm(mean, gain, error), "cov": torch.baddbmm(cov, gain, projected, alpha=-1)}


# ---- write ---------------------------------------------------------------------------------------------------------


def finish_write(mean, values, weights, gain) -> Tensor:
    """The new mean from all weights and gains ``c_t = U w_t / s_t``, both [B, T, K]; one triangular solve.

    ``δ_t = z_t − R₀ᵀw_t − Σ_{s<t} (w_t·c_s) δ_s``, ``R_T = R₀ + Σ c_t δ_tᵀ``.
    """
    error = torch.baddbmm(values, weights, mean, alpha=-1)
    delta = torch.linalg.solve_triangular((weights @ gain.mT).tril(-1), error, upper=False, unitriangular=True)
    return torch.baddbmm(mean, gain.mT, delta)


def factor_gram(mean, ridge) -> Tensor:
    gram = mean @ mean.mT
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge.unsqueeze(-1))
    return gram


def write_gram_space(mean, cov, values, noise_var, ridge, step, matrix) -> dict[str, Tensor]:
    """The write in K and T: one Gram product, T steps, one pass over the codes.

    ``step`` takes one pattern in; ``matrix`` is what it carries of ``A = R Rᵀ + λI``. Vectors are rows and U and Xᵀ
    stand side by side, so that one product with ``w`` and one pass along ``c`` serve both: on the CPU a batched row
    times a matrix is several times faster in PyTorch than a matrix times a column.
    """
    lam, rows = ridge.view(-1, 1, 1), cov.shape[-1]
    inner = values @ values.mT  # Q [B, T, T]
    carried = torch.cat((cov, mean @ values.mT), -1)  # [U, Xᵀ]  [B, K, K + T]
    weights, gains = [], []
    for t in range(values.shape[1]):
        x, q = carried[:, :, rows + t].unsqueeze(1), inner[:, t : t + 1]  # [B, 1, K], [B, 1, T]
        noise = noise_var[:, t].view(-1, 1, 1)
        matrix, carried, w, c = step(matrix, carried, x, q, q[..., t : t + 1], noise, lam)
        weights.append(w), gains.append(c)
    weights, gains = torch.cat(weights, 1), torch.cat(gains, 1)
    return {"mean": finish_write(mean, values, weights, gains), "cov": carried[..., :rows], "weights": weights}


def gain_and_move(carried, w, q, noise):
    """``c = U w / s``, and what U and Xᵀ lose along it: U w, and X w − Q_t."""
    rows = w.shape[-1]
    moved = w @ carried
    a = moved[..., :rows]
    c = a / ((w * a).sum(-1, keepdim=True) + noise)
    return c, torch.cat((a, moved[..., rows:] - q), -1)


def squared_error(q_t, w, x, lam):
    """``d = ‖z − Rᵀw‖² = Q_tt − w·x − λ‖w‖²``."""
    return q_t - (w * (x + lam * w)).sum(-1, keepdim=True)


def factoring_step(gram, carried, x, q, q_t, noise, lam, add=Tensor.addcmul_):
    """One Cholesky factorisation a pattern; ``A' = A + (d c + λw) cᵀ + c (λw)ᵀ``."""
    w = torch.cholesky_solve(x.mT, torch.linalg.cholesky_ex(gram).L).mT
    c, moved = gain_and_move(carried, w, q, noise)
    d, lw = squared_error(q_t, w, x, lam), lam * w
    gram = add(add(gram, (d * c + lw).mT, c), c.mT, lw)
    return gram, add(carried, c.mT, moved, value=-1), w, c


def woodbury_step(inverse, carried, x, q, q_t, noise, lam, add=Tensor.addcmul_):
    """No factorisation: ``A'⁻¹`` by Woodbury's identity from ``A' = A + [c w] [[d, λ], [λ, 0]] [c w]ᵀ``."""
    w = x @ inverse
    c, moved = gain_and_move(carried, w, q, noise)
    d = squared_error(q_t, w, x, lam)
    pair = torch.cat((c, w), 1)  # [B, 2, K]
    image = pair @ inverse
    small = image @ pair.mT  # [B, 2, 2], to which the inverse of [[d, λ], [λ, 0]] is added
    alpha, beta, gamma = small[:, :1, :1], small[:, :1, 1:] + 1 / lam, small[:, 1:, 1:] - d / (lam * lam)
    first, second = image[:, :1], image[:, 1:]
    det = alpha * gamma - beta * beta
    inverse = add(inverse, first.mT, (gamma * first - beta * second) / det, value=-1)
    inverse = add(inverse, second.mT, (alpha * second - beta * first) / det, value=-1)
    return inverse, add(carried, c.mT, moved, value=-1), w, c


def write_factoring(mean, cov, values, noise_var, ridge, step=factoring_step) -> dict[str, Tensor]:
    return write_gram_space(mean, cov, values, noise_var, ridge, step, factor_gram(mean, ridge))


def write_woodbury(mean, cov, values, noise_var, ridge, step=woodbury_step) -> dict[str, Tensor]:
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(factor_gram(mean, ridge)).L)
    return write_gram_space(mean, cov, values, noise_var, ridge, step, inverse)
