"""What the operations are, in float64, differentiable, by forms that lose few digits.

Weights come from the singular values of the mean, whose squares a Gram matrix would hold. A covariance is kept as its
root ``U = S Sᵀ`` and updated by Potter's formula, so that it stays positive definite whatever the noise. Shares no code
with the package.
"""

import math

import torch
from torch import Tensor


class Ridge(torch.autograd.Function):
    """``w = argmin ‖z − Rᵀw‖² + λ‖w‖²``, or ``argmin ‖Rz − Gw‖² + λ‖w‖²`` with ``G = R Rᵀ``; [B, Q, K]."""

    @staticmethod
    def forward(ctx, mean: Tensor, values: Tensor, ridge: Tensor, squared: bool) -> Tensor:
        left, size, right = torch.linalg.svd(mean, full_matrices=False)
        lam = ridge.view(-1, 1)
        gain = size**3 / (size**4 + lam) if squared else size / (size**2 + lam)
        weights = ((values @ right.mT) * gain.unsqueeze(1)) @ left.mT
        ctx.save_for_backward(mean, values, weights, left, size, lam)
        ctx.squared = squared
        return weights

    @staticmethod
    def backward(ctx, grad: Tensor):
        mean, values, weights, left, size, lam = ctx.saved_tensors
        inside = grad @ left
        along = size**4 if ctx.squared else size**2
        v = (inside / (along + lam).unsqueeze(1)) @ left.mT  # A⁻¹ w̄
        if left.shape[1] > left.shape[2]:
            v = v + (grad - inside @ left.mT) / lam.unsqueeze(-1)
        if not ctx.squared:
            delta = values - weights @ mean
            return v.mT @ delta - weights.mT @ (v @ mean), v @ mean, -(v * weights).sum((1, 2)), None
        # w = A⁻¹ G x with A = G² + λI, x = R z:  Ḡ = v (x − G w)ᵀ − (G v) wᵀ,  x̄ = G v
        solved_values, solved_weights = v @ mean, weights @ mean
        target = (values - solved_weights) @ mean.mT  # x − G w
        gram_v = solved_values @ mean.mT  # G v
        grad_gram = v.mT @ target - gram_v.mT @ weights
        to_mean = (grad_gram + grad_gram.mT) @ mean + gram_v.mT @ values
        return to_mean, gram_v @ mean, -(v * weights).sum((1, 2)), None


def step_divergence(x: Tensor) -> Tensor:
    """``ln(1 + x) − x/(1 + x)``, by its series where it is small."""
    small = x < 1e-2
    series = sum((-1) ** n * (n - 1) / n * x**n for n in range(2, 10))
    safe = torch.where(small, 1.0, x)
    return torch.where(small, series, torch.log1p(safe) - safe / (1 + safe))


def condition(mean: Tensor, root: Tensor, w: Tensor, z: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """One pattern: the new mean and root, s, KL of the step, and its log-likelihood. ``w`` [B, K], ``noise`` [B]."""
    f = (root.mT @ w.unsqueeze(-1)).squeeze(-1)
    explained = f.square().sum(-1)
    s = explained + noise
    delta = z - (w.unsqueeze(1) @ mean).squeeze(1)
    a = (root @ f.unsqueeze(-1)).squeeze(-1)
    new_mean = mean + a.unsqueeze(-1) * (delta / s.unsqueeze(-1)).unsqueeze(1)
    shrink = 1 / (s + (s * noise).sqrt())
    new_root = root - a.unsqueeze(-1) * (shrink.unsqueeze(-1) * f).unsqueeze(1)
    energy, code_size = delta.square().sum(-1), z.shape[-1]
    kl = 0.5 * (code_size * step_divergence(explained / noise) + explained / s**2 * energy)
    log_likelihood = -0.5 * (code_size * (2 * math.pi * s).log() + energy / s)
    return new_mean, new_root, s, kl, log_likelihood


def run(problems, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs by name, of float64 ``inputs``."""
    if "cov" in inputs:
        return episode(problems, inputs)
    values = inputs["queries"]
    for _ in range(problems.times):
        weights = Ridge.apply(inputs["mean"], values, inputs["ridge"], problems.squared_gram)
        values = weights @ inputs["mean"]
    return {"values": values, "weights": weights} if problems.operation == "read" else {"weights": weights}


def episode(problems, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    mean, noise_var = inputs["mean"], inputs["noise_var"]
    cov = inputs["cov"]
    root = torch.linalg.cholesky((cov + cov.mT) / 2)
    given = inputs.get("weights")
    steps = []
    for t in range(noise_var.shape[1]):
        here = torch.ones_like(noise_var[:, t]) if problems.mask is None else problems.mask[:, t].double()
        here = here.unsqueeze(-1)
        z, noise, candidate = inputs["values"][:, t] * here, noise_var[:, t], mean
        for _ in range(problems.times):
            w = solve(problems, candidate, z, inputs) if given is None else given[:, t]
            candidate, new_root, s, kl, log_likelihood = condition(mean, root, w * here, z, noise)
        mean, root = candidate, new_root
        steps.append((w * here, s, kl, log_likelihood * here.squeeze(-1)))
    weights, s, kl, log_likelihood = (torch.stack(x, 1) for x in zip(*steps, strict=True))
    outputs = {"mean": mean, "cov": root @ root.mT, "weights": weights, "innovation_var": s, "kl": kl}
    if given is not None:
        del outputs["weights"]
        outputs["log_evidence"] = log_likelihood.sum(-1)
    return outputs


def solve(problems, mean: Tensor, z: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return Ridge.apply(mean, z.unsqueeze(1), inputs["ridge"], problems.squared_gram).squeeze(1)
