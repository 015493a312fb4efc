"""What a good PyTorch user would write: the forms that the kernels are compared with.

A form takes an episode and returns fields of the result by name: all of them, or the new memory alone where the name
says so. What a form returns is verified, what it leaves out is time saved, so the leanest form is the hardest to beat.
Forms of a case with gradient return all fields, change nothing in place and are differentiated by autograd.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.filter_forms import filter_chunks
from benchmarks.living_forms import remove_at_once, replace_at_once, update_root_at_once
from fastkm.addressing.reference import solve_addressing
from fastkm.posterior.reference import information, update_sequential
from fastkm.testing.definitions import (
    Result,
    filter_one_by_one,
    remove_one_by_one,
    replace_one_by_one,
    update_one_by_one,
    update_root_one_by_one,
    write_literal,
)
from fastkm.testing.episodes import Episode
from fastkm.testing.gradients import gradient_of
from fastkm.testing.operations import OPERATIONS, Case

Form = Callable[[Episode], Result]
LOOP = "literal loop"


def regularised_gram(mean: Tensor, ridge: Tensor) -> Tensor:
    return mean @ mean.mT + torch.diag_embed(ridge.unsqueeze(-1).expand(mean.shape[:2]))


def factor(matrix: Tensor) -> Tensor:
    return torch.linalg.cholesky_ex(matrix).L  # without the look at its status that waits for the result


# ---- update_posterior ----------------------------------------------------------------------------------------------


def update_block(mean, cov, weights, values, noise_var) -> Result:
    """V = W U, V Wᵀ + σ²I = L Lᵀ, G = L⁻¹V, E = L⁻¹(Z − W R); R + GᵀE, U − GᵀG."""
    projected = weights @ cov
    lower = factor(projected @ weights.mT + torch.diag_embed(noise_var))
    gain = torch.linalg.solve_triangular(lower, projected, upper=False)
    error = torch.linalg.solve_triangular(lower, torch.baddbmm(values, weights, mean, alpha=-1), upper=False)
    innovation_var = lower.diagonal(dim1=-2, dim2=-1).square()
    energy, explained = error.square().sum(-1), innovation_var - noise_var
    kl, log_evidence = information(explained, noise_var, energy, values.shape[-1], None)
    state = {"mean": torch.baddbmm(mean, gain.mT, error), "cov": torch.baddbmm(cov, gain.mT, gain, alpha=-1)}
    return {**state, "innovation_var": innovation_var, "kl": kl, "log_evidence": log_evidence}


def update_gain(mean, cov, weights, values, noise_var) -> Result:
    """The Kalman gain S⁻¹V from one ``cholesky_solve``: R + VᵀS⁻¹(Z − W R), U − VᵀS⁻¹V."""
    projected = weights @ cov
    innovation = projected @ weights.mT + torch.diag_embed(noise_var)
    gain = torch.cholesky_solve(projected, factor(innovation)).mT  # [B, K, T]
    error = torch.baddbmm(values, weights, mean, alpha=-1)
    return {"mean": torch.baddbmm(mean, gain, error), "cov": torch.baddbmm(cov, gain, projected, alpha=-1)}


def update_loop(mean, cov, weights, values, noise_var, step=update_sequential) -> Result:
    for t in range(values.shape[1]):
        now = slice(t, t + 1)
        mean, cov, _ = step(mean, cov, weights[:, now], values[:, now], noise_var[:, now])
    return {"mean": mean, "cov": cov}


# ---- write ---------------------------------------------------------------------------------------------------------


def write_step(mean, cov, z, noise_var, ridge) -> tuple[Tensor, Tensor, Tensor]:
    """One pattern z [B, 1, C] of the literal loop."""
    w = torch.cholesky_solve(mean @ z.mT, factor(regularised_gram(mean, ridge)))  # [B, K, 1]
    a = cov @ w
    s = w.mT @ a + noise_var.unsqueeze(-1)
    return mean + a @ (z - w.mT @ mean) / s, cov - a @ a.mT / s, w


def write_step_dual(mean, cov, z, noise_var, ridge) -> tuple[Tensor, Tensor, Tensor]:
    """The same with ``w = R (RᵀR + λI)⁻¹ z``, a solve in C."""
    w = mean @ torch.cholesky_solve(z.mT, factor(regularised_gram(mean.mT, ridge)))  # [B, K, 1]
    a = cov @ w
    s = w.mT @ a + noise_var.unsqueeze(-1)
    return mean + a @ (z - w.mT @ mean) / s, cov - a @ a.mT / s, w


def write_loop(mean, cov, values, noise_var, ridge, step=write_step) -> Result:
    weights = []
    for t in range(values.shape[1]):
        now = slice(t, t + 1)
        mean, cov, w = step(mean, cov, values[:, now], noise_var[:, now], ridge)
        weights.append(w)
    return {"mean": mean, "cov": cov, "weights": torch.cat(weights, -1).mT}


def gain_and_loss(carried, w, q, noise):
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
    w = torch.cholesky_solve(x.mT, factor(gram)).mT
    c, lost = gain_and_loss(carried, w, q, noise)
    d, lw = squared_error(q_t, w, x, lam), lam * w
    gram = add(add(gram, (d * c + lw).mT, c), c.mT, lw)
    return gram, add(carried, c.mT, lost, value=-1), w, c


def woodbury_step(inverse, carried, x, q, q_t, noise, lam, add=Tensor.addcmul_):
    """No factorisation: ``A'⁻¹`` by Woodbury's identity from ``A' = A + [c w] [[d, λ], [λ, 0]] [c w]ᵀ``."""
    w = x @ inverse
    c, lost = gain_and_loss(carried, w, q, noise)
    d = squared_error(q_t, w, x, lam)
    pair = torch.cat((c, w), 1)  # [B, 2, K]
    image = pair @ inverse
    small = image @ pair.mT  # [B, 2, 2], to which the inverse of [[d, λ], [λ, 0]] is added
    alpha, beta, gamma = small[:, :1, :1], small[:, :1, 1:] + 1 / lam, small[:, 1:, 1:] - d / (lam * lam)
    first, second = image[:, :1], image[:, 1:]
    det = alpha * gamma - beta * beta
    inverse = add(inverse, first.mT, (gamma * first - beta * second) / det, value=-1)
    inverse = add(inverse, second.mT, (alpha * second - beta * first) / det, value=-1)
    return inverse, add(carried, c.mT, lost, value=-1), w, c


def gram_space(mean, cov, values, noise_var, ridge, step, inverted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, gains ``c_t = U w_t / s_t``, new cov) of a write that stays in K and T.

    Vectors are rows, and U and Xᵀ = R Zᵀ stand side by side, so that one product with ``w`` and one pass along ``c``
    serve both: on the CPU PyTorch is several times faster at a row times a matrix than at a matrix times a column.
    """
    lam, rows = ridge.view(-1, 1, 1), cov.shape[-1]
    matrix = regularised_gram(mean, ridge)
    matrix = torch.cholesky_inverse(factor(matrix)) if inverted else matrix
    inner = values @ values.mT  # Q [B, T, T]
    carried = torch.cat((cov, mean @ values.mT), -1)  # [U, Xᵀ]  [B, K, K + T]
    weights, gains = [], []
    for t in range(values.shape[1]):
        x, q = carried[:, :, rows + t].unsqueeze(1), inner[:, t : t + 1]  # [B, 1, K], [B, 1, T]
        noise = noise_var[:, t].view(-1, 1, 1)
        matrix, carried, w, c = step(matrix, carried, x, q, q[..., t : t + 1], noise, lam)
        weights.append(w), gains.append(c)
    return torch.cat(weights, 1), torch.cat(gains, 1), carried[..., :rows]


def write_gram(mean, cov, values, noise_var, ridge, step, inverted) -> Result:
    """The new mean from one triangular solve: ``δ_t = z_t − R₀ᵀw_t − Σ_{s<t} (w_t·c_s) δ_s``, ``R₀ + Σ c_t δ_tᵀ``."""
    weights, gains, cov = gram_space(mean, cov, values, noise_var, ridge, step, inverted)
    error = torch.baddbmm(values, weights, mean, alpha=-1)
    delta = torch.linalg.solve_triangular((weights @ gains.mT).tril(-1), error, upper=False, unitriangular=True)
    return {"mean": torch.baddbmm(mean, gains.mT, delta), "cov": cov, "weights": weights}


def write_gram_all(mean, cov, values, noise_var, ridge, step, inverted) -> Result:
    """All fields: the update in block form with the weights that were found."""
    weights, _, _ = gram_space(mean, cov, values, noise_var, ridge, step, inverted)
    updated = update_block(mean, cov, weights, values, noise_var)
    del updated["log_evidence"]  # not a field of a write
    return {**updated, "weights": weights}


# ---- read and solve_addressing ----------------------------------------------------------------------------------


def read_loop(mean, queries, ridge, num_iters) -> Result:
    for _ in range(num_iters):
        weights = solve_addressing(mean, queries, ridge, False)[0]
        queries = weights @ mean
    return {"values": queries, "weights": weights}


def read_factored(mean, queries, ridge, num_iters) -> Result:
    lower, lam = factor(regularised_gram(mean, ridge)), ridge.view(-1, 1, 1)
    weights = torch.cholesky_solve(mean @ queries.mT, lower)  # [B, K, Q]
    for _ in range(num_iters - 1):
        weights = weights - lam * torch.cholesky_solve(weights, lower)
    return {"values": weights.mT @ mean, "weights": weights.mT}


def read_dual(mean, queries, ridge, num_iters) -> Result:
    """One factorisation in C: ``w = R (RᵀR + λI)⁻¹ z``."""
    lower = factor(regularised_gram(mean.mT, ridge))
    for _ in range(num_iters):
        weights = (mean @ torch.cholesky_solve(queries.mT, lower)).mT  # [B, Q, K]
        queries = weights @ mean
    return {"values": queries, "weights": weights}


def read_inverse(mean, queries, ridge, num_iters) -> Result:
    """An explicit inverse, and products: w ← w − λ w A⁻¹."""
    inverse = torch.cholesky_inverse(factor(regularised_gram(mean, ridge)))
    weights, shrink = queries @ mean.mT @ inverse, ridge.view(-1, 1, 1) * inverse
    for _ in range(num_iters - 1):
        weights = torch.baddbmm(weights, weights, shrink, alpha=-1)
    return {"values": weights @ mean, "weights": weights}


def read_power(mean, queries, ridge, num_iters) -> Result:
    """The whole read as one matrix: A⁻¹ (I − λ A⁻¹)ⁿ⁻¹, by repeated squaring."""
    inverse = torch.cholesky_inverse(factor(regularised_gram(mean, ridge)))
    one = torch.eye(mean.shape[1], dtype=mean.dtype)
    shrink = torch.linalg.matrix_power(one - ridge.view(-1, 1, 1) * inverse, num_iters - 1)
    weights = queries @ mean.mT @ (inverse @ shrink)
    return {"values": weights @ mean, "weights": weights}


def read_eigen(mean, queries, ridge, num_iters) -> Result:
    """Mode i of R Rᵀ = V g Vᵀ is scaled by (g/(g + λ))ⁿ⁻¹ / (g + λ)."""
    values, vectors = torch.linalg.eigh(mean @ mean.mT)
    damped = values + ridge.unsqueeze(-1)
    scale = (values / damped) ** (num_iters - 1) / damped
    weights = queries @ mean.mT @ (vectors * scale.unsqueeze(1)) @ vectors.mT
    return {"values": weights @ mean, "weights": weights}


def solve_inverse(mean, queries, ridge) -> Result:
    return {"weights": queries @ mean.mT @ torch.cholesky_inverse(factor(regularised_gram(mean, ridge)))}


# ---- kl_memory and logdet ------------------------------------------------------------------------------------------


def log_det(lower: Tensor) -> Tensor:
    return 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def kl_memory(mean, cov, prior_mean, prior_cov) -> Result:
    """½ [C tr(U0⁻¹U) + tr(ΔᵀU0⁻¹Δ) − KC + C (ln|U0| − ln|U|)], both traces from one triangular solve each."""
    _, rows, columns = mean.shape
    lower, prior = torch.linalg.cholesky(cov), torch.linalg.cholesky(prior_cov)
    spread = torch.linalg.solve_triangular(prior, lower, upper=False).square().sum((-2, -1))
    shift = torch.linalg.solve_triangular(prior, mean - prior_mean, upper=False).square().sum((-2, -1))
    return {"value": 0.5 * (columns * (spread - rows + log_det(prior) - log_det(lower)) + shift)}


def kl_memory_inverse(mean, cov, prior_mean, prior_cov) -> Result:
    """Traces from an explicit U0⁻¹, as entry by entry products."""
    _, rows, columns = mean.shape
    lower, prior = factor(cov), factor(prior_cov)
    precision, delta = torch.cholesky_inverse(prior), mean - prior_mean
    spread, shift = (precision * cov).sum((-2, -1)), (delta * (precision @ delta)).sum((-2, -1))
    return {"value": 0.5 * (columns * (spread - rows + log_det(prior) - log_det(lower)) + shift)}


# ---- every form of an operation ------------------------------------------------------------------------------------


def update_inputs(e: Episode) -> tuple:
    return *e.prior, e.weights, e.values, e.noise_var


def write_inputs(e: Episode) -> tuple:
    return *e.prior, e.values, e.noise_var, e.ridge


def read_inputs(e: Episode) -> tuple:
    return e.written.mean, e.queries, e.ridge, e.num_iters


def on(inputs: Callable[[Episode], tuple], function: Callable[..., Result], **options) -> Form:
    return lambda e: function(*inputs(e), **options)


def kl_inputs(e: Episode) -> tuple:
    return *e.written, *e.prior


WOODBURY = {"step": woodbury_step, "inverted": True}
FACTORING = {"step": factoring_step, "inverted": False}
WOODBURY_KEEPING = {"step": partial(woodbury_step, add=torch.addcmul), "inverted": True}
FACTORING_KEEPING = {"step": partial(factoring_step, add=torch.addcmul), "inverted": False}

FORMS: dict[Case, dict[str, Form]] = {
    Case("update_posterior"): {
        LOOP: on(update_inputs, update_loop),
        "block form": on(update_inputs, update_block),
        "gain form, state only": on(update_inputs, update_gain),
    },
    Case("remove_patterns"): {LOOP: remove_one_by_one, "block form": remove_at_once},
    Case("replace_patterns"): {LOOP: replace_one_by_one, "gain and block form": replace_at_once},
    Case("update_square_root"): {LOOP: update_root_one_by_one, "block form": update_root_at_once},
    Case("filter_posterior"): {LOOP: filter_one_by_one, "block form": filter_chunks},
    Case("write"): {
        LOOP: on(write_inputs, write_loop),
        "Gram space, factoring, state only": on(write_inputs, write_gram, **FACTORING),
        "Gram space, Woodbury, state only": on(write_inputs, write_gram, **WOODBURY),
        "Gram space, Woodbury": on(write_inputs, write_gram_all, **WOODBURY),
    },
    Case("read"): {
        LOOP: on(read_inputs, read_loop),
        "K-space, factored once": on(read_inputs, read_factored),
        "K-space, inverse": on(read_inputs, read_inverse),
        "K-space, matrix power": on(read_inputs, read_power),
        "K-space, eigenvalues": on(read_inputs, read_eigen),
    },
    Case("solve_addressing"): {
        "cholesky_solve": lambda e: {"weights": solve_addressing(e.written.mean, e.queries, e.ridge, False)[0]},
        "inverse": lambda e: solve_inverse(e.written.mean, e.queries, e.ridge),
    },
    Case("factor_addressing"): {
        "cholesky_solve": lambda e: {
            "pseudoinverse": solve_addressing(e.written.mean, unit_codes(e), e.ridge, False)[0]
        },
    },
    Case("kl_memory"): {
        "closed form": on(kl_inputs, kl_memory),
        "closed form, inverse": on(kl_inputs, kl_memory_inverse),
    },
    Case("logdet"): {"closed form": lambda e: {"value": log_det(torch.linalg.cholesky(e.written.cov))}},
    Case("update_posterior", True): {
        LOOP: update_one_by_one,
        "block form": on(update_inputs, update_block),
    },
    Case("remove_patterns", True): {LOOP: remove_one_by_one, "block form": remove_at_once},
    Case("replace_patterns", True): {
        LOOP: replace_one_by_one,
        "gain and block form": replace_at_once,
    },
    Case("update_square_root", True): {
        LOOP: update_root_one_by_one,
        "block form": update_root_at_once,
    },
    Case("filter_posterior", True): {LOOP: filter_one_by_one, "block form": filter_chunks},
    Case("write", True): {
        LOOP: write_literal,
        "Gram space, factoring": on(write_inputs, write_gram_all, **FACTORING_KEEPING),
        "Gram space, Woodbury": on(write_inputs, write_gram_all, **WOODBURY_KEEPING),
    },
    Case("read_factored", True): {"K-space, factored once": on(read_inputs, read_factored)},
    Case("read", True): {
        LOOP: on(read_inputs, read_loop),
        "K-space, factored once": on(read_inputs, read_factored),
        "K-space, inverse": on(read_inputs, read_inverse),
        "K-space, matrix power": on(read_inputs, read_power),
        "K-space, eigenvalues": on(read_inputs, read_eigen),
    },
}


# Forms that are worth their time only where a code is shorter than the memory has rows.
DUAL: dict[Case, dict[str, Form]] = {
    Case("write"): {"literal loop, dual solve": on(write_inputs, write_loop, step=write_step_dual)},
    Case("read"): {"C-space, factored once": on(read_inputs, read_dual)},
}


def unit_codes(e: Episode) -> Tensor:
    return torch.eye(e.queries.shape[-1]).to(e.queries).expand(len(e.ridge), -1, -1)


def keeping_pseudoinverse(e: Episode) -> Form:
    """All iterations of a read as one matrix that is computed once: two products are left."""
    pseudoinverse = read_factored(e.written.mean, unit_codes(e), e.ridge, e.num_iters)["weights"]

    def read(e: Episode) -> Result:
        weights = e.queries @ pseudoinverse
        return {"values": weights @ e.written.mean, "weights": weights}

    return read


def keeping_factor(e: Episode) -> Form:
    lower = factor(regularised_gram(e.written.mean, e.ridge))
    return lambda e: {"weights": torch.cholesky_solve(e.written.mean @ e.queries.mT, lower).mT}


def keeping_inverse(e: Episode) -> Form:
    pseudoinverse = solve_inverse(e.written.mean, unit_codes(e), e.ridge)["weights"]
    return lambda e: {"weights": e.queries @ pseudoinverse}


# Forms of the operations that come after a factor: what does not depend on the queries is computed once, before.
KEEPING: dict[Case, dict[str, Callable[[Episode], Form]]] = {
    Case("solve_factored"): {"kept factor": keeping_factor, "kept pseudo-inverse": keeping_inverse},
    Case("read_factored"): {"kept pseudo-inverse of all iterations": keeping_pseudoinverse},
}


def compiled_step(inputs, function, step, **options) -> Callable[[bool], Form]:
    """A loop whose step is compiled: one compilation, T calls. Unrolled, a loop compiles for minutes."""
    return lambda dynamic: on(inputs, function, step=torch.compile(step, dynamic=dynamic), **options)


def compiled_whole(inputs, function) -> Callable[[bool], Form]:
    return lambda dynamic: on(inputs, torch.compile(function, dynamic=dynamic))


# Makers, as what torch.compile returns is specialised to the shapes it meets first unless it is dynamic.
COMPILED: dict[Case, dict[str, Callable[[bool], Form]]] = {
    Case("update_posterior"): {
        "compiled loop": compiled_step(update_inputs, update_loop, update_sequential),
        "compiled block form": compiled_whole(update_inputs, update_block),
        "compiled gain form, state only": compiled_whole(update_inputs, update_gain),
    },
    Case("write"): {
        "compiled loop": compiled_step(write_inputs, write_loop, write_step),
        "compiled Gram space, state only": compiled_step(
            write_inputs, write_gram, WOODBURY_KEEPING["step"], inverted=True
        ),
    },
    Case("read"): {
        "compiled loop": compiled_whole(read_inputs, read_loop),
        "compiled K-space": compiled_whole(read_inputs, read_power),
    },
    Case("kl_memory"): {"compiled closed form": compiled_whole(kl_inputs, kl_memory)},
    Case("update_posterior", True): {"compiled block form": compiled_whole(update_inputs, update_block)},
    Case("write", True): {
        "compiled Gram space": compiled_step(write_inputs, write_gram_all, WOODBURY_KEEPING["step"], inverted=True)
    },
    Case("read", True): {"compiled K-space": compiled_whole(read_inputs, read_power)},
}


def forms(case: Case) -> dict[str, Form]:
    """Everything in eager PyTorch, with the gradient where the case asks for it."""
    return {name: differentiated(form, case) for name, form in FORMS.get(case, {}).items()}


def compiled_forms(case: Case, dynamic: bool = False) -> dict[str, Callable[[], Form]]:
    """Makers; ``dynamic``: one compilation for all sizes above 1."""
    made = COMPILED.get(case, {})
    return {name: lambda make=make: differentiated(make(dynamic), case) for name, make in made.items()}


def differentiated(form: Form, case: Case) -> Form:
    return gradient_of(form, OPERATIONS[case.operation].inputs) if case.gradient else form
