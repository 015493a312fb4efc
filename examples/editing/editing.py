"""A layer is edited, and edits are removed, by the update of a memory; the papers' formula in float64 stands beside it.

The second matrix of an MLP, W [K, C], maps keys k [K] to values v = Wᵀk [C]. RLSEdit (Wang et al., IJCAI 2026,
arXiv 2601.15686, §4.4) edits it, for a batch of keys K_t [T, K] and wanted values V_t [T, C], by::

    C_0 = (λ² I + μ² K_0ᵀ K_0)⁻¹    F = C K_tᵀ    C' = C − F (I + K_t F)⁻¹ Fᵀ    W' = W + C' K_tᵀ (V_t − K_t W)

This is ``update_posterior`` with mean = W, cov = C, weights = K_t, values = V_t and noise_var = 1. One step of MEMIT
(Meng et al., ICLR 2023: Δ = R K_1ᵀ (Λ + K_1 K_1ᵀ)⁻¹, with keys as columns and R = V_1 − W K_1) is the same update from
C_0⁻¹ = Λ = λ E[k kᵀ]. Analytic continual learning (Zhuang et al., NeurIPS 2022: R ← R − R Xᵀ (I + X R Xᵀ)⁻¹ X R,
W ← W + R Xᵀ (Y − X W)) is the same recursion from C_0 = I / γ. After all batches::

    W = (C_0⁻¹ + Σ K_tᵀ K_t)⁻¹ (C_0⁻¹ W_0 + Σ K_tᵀ V_t)
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import fastkm
from examples.editing.transformer import EDITED_WITH, OBJECTS, Facts, Transformer

STEPS = 25  # of gradient descent, to a value with which the model answers with the new object


class Edits(NamedTuple):
    keys: Tensor  # [N, K]
    values: Tensor  # [N, C]

    def __getitem__(self, which) -> "Edits":
        return Edits(self.keys[which], self.values[which])


def draw_edits(facts: Facts, seed: int = 1) -> Facts:
    """The same questions with other objects."""
    generator = torch.Generator().manual_seed(seed)
    others = facts.objects + torch.randint(1, OBJECTS, facts.objects.shape, generator=generator)
    return Facts(facts.subjects, others % OBJECTS)


def anchor(model: Transformer, facts: Facts, identity: float, weight: float) -> Tensor:
    """λ² I + μ² K_0ᵀ K_0 [K, K] in float64: what the layer does on K_0, the keys of ``facts``, is to stay."""
    keys = torch.cat([keys_of(model, facts, phrase) for phrase in range(EDITED_WITH)]).double()
    return weight * keys.mT @ keys / EDITED_WITH + identity * torch.eye(keys.shape[-1], dtype=torch.float64)


def keys_of(model: Transformer, facts: Facts, phrase: int) -> Tensor:
    return model.edited.keys(model.before(facts.prompts(phrase)))


def find_edits(model: Transformer, facts: Facts) -> Edits:
    """A key for each fact, the mean over phrases, and the value with which the model answers with its object."""
    inputs = torch.stack([model.before(facts.prompts(phrase)) for phrase in range(EDITED_WITH)])
    keys = model.edited.keys(inputs)
    outputs = inputs + keys @ model.edited.down
    change = torch.zeros_like(outputs[0], requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=0.3)
    for _ in range(STEPS):
        logits = model.head(outputs + change)
        loss = cross_entropy(logits.flatten(0, 1), facts.objects.repeat(EDITED_WITH), reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    key = keys.mean(0)
    return Edits(key, key @ model.edited.down + change.detach())


def layer_state(model: Transformer, precision: Tensor) -> fastkm.MemoryState:
    """The memory whose mean is the layer's own matrix: what is written to the memory is in the model."""
    cov = torch.cholesky_inverse(torch.linalg.cholesky(precision))
    cov = ((cov + cov.mT) / 2).float().contiguous()
    return fastkm.MemoryState(model.edited.down.data.unsqueeze(0), cov.unsqueeze(0))


def write(state: fastkm.MemoryState, edits: Edits) -> None:
    """Edit the layer in place."""
    fastkm.update_posterior(state, edits.keys.unsqueeze(0), edits.values.unsqueeze(0), 1.0, out=state)


def remove(state: fastkm.MemoryState, edits: Edits) -> None:
    """Take edits out of the layer as if they had never been made."""
    without = fastkm.remove_patterns(state, edits.keys.unsqueeze(0), edits.values.unsqueeze(0), 1.0)
    for old, new in zip(state, without, strict=True):
        old.copy_(new)


def formula(precision: Tensor, original: Tensor, edits: Edits) -> Tensor:
    """The layer after all edits at once [K, C], in float64."""
    keys, values = edits.keys.double(), edits.values.double()
    factor = torch.linalg.cholesky(precision + keys.mT @ keys)
    return torch.cholesky_solve(precision @ original.double() + keys.mT @ values, factor)


def gap(layer: Tensor, exact: Tensor) -> float:
    """Largest difference / largest entry."""
    return ((layer.double() - exact).abs().max() / exact.abs().max()).item()
