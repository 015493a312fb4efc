"""The equations in float64 NumPy, one memory at a time, in the plainest form; independent of the package.

Letters as in :mod:`fastkm.state`; ``squared`` is the squared-Gram solve of the released DeepMind code.
"""

import math

import numpy as np
import torch


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


def filter_steps(R, U, W, Z, Q, noise, retention, forgetting, prior_var, mask, before=False):
    """Decay, write, read, step by step; a masked step only reads."""
    values, variance, s, log_evidence = [], [], noise.copy(), 0.0
    for t in range(len(W)):
        prior = R, U
        if mask[t]:
            R, U = retention[t] * R, retention[t] ** 2 * U + (1 - retention[t] ** 2) * prior_var * np.eye(len(U))
            prior = R, U = R, U / forgetting[t]
            R, U, s[t], _, log_likelihood = rank_one(R, U, W[t], Z[t], noise[t])
            log_evidence += log_likelihood
        mean, cov = prior if before else (R, U)
        values.append(mean.T @ Q[t]), variance.append(Q[t] @ cov @ Q[t])
    return {
        "mean": R,
        "cov": U,
        "values": np.array(values).reshape(len(W), R.shape[1]),
        "variance": np.array(variance).reshape(len(W)),
        "innovation_var": s,
        "log_evidence": np.asarray(log_evidence),
    }


def filter_at_once(R, U, W, Z, Q, noise, retention, forgetting, prior_var, mask):
    """Every read as one regression on all that came before it, by the joint law of the memories at all steps.

    With retention M_t has the prior covariance ``C_tt`` and ``C_ts = (m_t/m_s) C_ss`` with M_s; forgetting divides the
    noise of pattern s by ``Π γ`` of the steps after it, and the first precision is multiplied by ``Π γ`` of all.
    """
    identity, kept, values, variance = np.eye(len(U)), np.flatnonzero(mask), [], []
    retention, forgetting = np.where(mask, retention, 1), np.where(mask, forgetting, 1)
    m, weight = np.cumprod(retention), np.cumprod(forgetting)
    for t in range(len(W)):
        past = kept[kept <= t]
        first = U / weight[t]

        def prior_cov(i, j, first=first):  # of M_i with M_j, j ≤ i
            return m[i] / m[j] * (m[j] ** 2 * first + (1 - m[j] ** 2) * prior_var * identity)

        noises = noise[past] * weight[past] / weight[t]
        S, cross = np.diag(noises), np.zeros((len(past), len(U)))
        for a, i in enumerate(past):
            cross[a] = prior_cov(t, i) @ W[i]
            for b, j in enumerate(past):
                S[a, b] += W[i] @ prior_cov(max(i, j), min(i, j)) @ W[j]
        innovations = Z[past] - m[past, None] * (W[past] @ R)
        mean = m[t] * R + cross.T @ np.linalg.solve(S, innovations)
        cov = prior_cov(t, t) - cross.T @ np.linalg.solve(S, cross)
        values.append(mean.T @ Q[t]), variance.append(Q[t] @ cov @ Q[t])
    return {"values": np.array(values), "variance": np.array(variance), "mean": mean, "cov": cov}


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
