"""Facts in a memory of fixed size: the address is made of the sentence, the value is a random code of the fact.

An encoder gives a unit vector e for a sentence. Its address is w = relu(e G) / ‖relu(e G)‖ with a fixed random G
[D, K]; the value is a code of C signs drawn for the fact. A value that were e itself could be read from a memory that
never learned anything, by w ↦ e. A read asks with the paraphrase: ẑ = Rᵀw, and the answer is the fact whose code is
nearest. Its energy is −ln p(code | w, memory): high where the memory has no such fact.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

import fastkm

K, C, NOISE_VAR = 512, 256, 0.3
SHARPNESS = 20.0  # β of the softmax read


class Answers(NamedTuple):
    facts: Tensor  # [Q], index of the fact
    energy: Tensor  # [Q], nats


class Texts(NamedTuple):
    written: Tensor  # [N, D], vectors of the sentences
    asked: Tensor  # [N, D], of their paraphrases
    unseen: Tensor  # [M, D], of paraphrases of facts that are never written


def addresses(vectors: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return normalize(torch.relu(vectors @ torch.randn(vectors.shape[-1], K, generator=generator)), dim=-1)


def codes(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, C, generator=torch.Generator().manual_seed(seed)).sign()


def prior() -> fastkm.MemoryState:
    return fastkm.MemoryState(torch.zeros(1, K, C), torch.eye(K).unsqueeze(0))


def write(state: fastkm.MemoryState, vectors: Tensor, values: Tensor) -> fastkm.MemoryState:
    return fastkm.update_posterior(state, addresses(vectors).unsqueeze(0), values.unsqueeze(0), NOISE_VAR).state


def read(state: fastkm.MemoryState, vectors: Tensor, known: Tensor) -> Answers:
    """The nearest of the codes ``known`` [N, C] for each question, and its energy."""
    w = addresses(vectors)
    recalled = w @ state.mean[0]
    facts = (recalled @ known.mT).argmax(-1)
    variance = (w @ state.cov[0] * w).sum(-1) + NOISE_VAR
    squared = (known[facts] - recalled).square().sum(-1)
    return Answers(facts, (squared / variance + C * (2 * torch.pi * variance).log()) / 2)


def share_right(found: Tensor) -> float:
    return (found == torch.arange(len(found))).float().mean().item()


def area_under_curve(written: Tensor, unseen: Tensor) -> float:
    """How often a question about a written fact has the lower energy: one half is chance."""
    return (written.unsqueeze(-1) < unseen).float().mean().item()


class Row(NamedTuple):
    facts: int
    memory: float  # share of the paraphrases that are answered with their fact
    flat: float  # the nearest of all stored vectors
    softmax: float
    energy: float  # area under the curve, written against never written
    distance: float  # the same by the distance to the nearest stored vector


def row(texts: Texts, count: int) -> Row:
    written, asked, values = texts.written[:count], texts.asked[:count], codes(count)
    state = write(prior(), written, values)
    answers, unseen = read(state, asked, values), read(state, texts.unseen, values)
    near, found = flat(written, asked)
    mixed = (SHARPNESS * asked @ written.mT).softmax(-1) @ values
    return Row(
        count,
        share_right(answers.facts),
        share_right(found),
        share_right((mixed @ values.mT).argmax(-1)),
        area_under_curve(answers.energy, unseen.energy),
        area_under_curve(-near, -flat(written, texts.unseen)[0]),
    )


def flat(stored: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity and index of the nearest stored vector; by faiss where it is installed."""
    try:
        import faiss
    except ImportError:
        return tuple((asked @ stored.mT).max(-1))
    index = faiss.IndexFlatIP(stored.shape[-1])
    index.add(stored.numpy())
    near, found = index.search(asked.numpy(), 1)
    return torch.from_numpy(near[:, 0]), torch.from_numpy(found[:, 0])


def live(texts: Texts, count: int) -> dict[str, float]:
    """Half of the facts written elsewhere and merged; a quarter replaced, and a quarter removed."""
    written, asked, values = texts.written[:count], texts.asked[:count], codes(count)
    whole, half, quarter = write(prior(), written, values), count // 2, count // 4
    parts = [write(prior(), written[part], values[part]) for part in (slice(half), slice(half, count))]
    told = {"merged": gap(fastkm.merge_memories(parts, prior()), whole)}

    known = torch.cat([values, codes(quarter, seed=2)])  # new answers to the first quarter
    old, new = values[:quarter], known[count:]
    w = addresses(written).unsqueeze(0)
    changed = fastkm.replace_patterns(whole, w[:, :quarter], old[None], w[:, :quarter], new[None], NOISE_VAR)
    told["new answers"] = share_right(read(changed, asked[:quarter], known).facts - count)
    told["before"] = share_right(read(whole, asked, values).facts[:quarter])

    removed = slice(half, half + quarter)
    without = fastkm.remove_patterns(whole, w[:, removed], values[None, removed], NOISE_VAR)
    rest = torch.cat([torch.arange(half), torch.arange(half + quarter, count)])
    told["removed"] = gap(without, write(prior(), written[rest], values[rest]))
    for name, state, left in (("energy before", whole, values), ("energy after", without, values[rest])):
        energies = (read(state, x, left).energy for x in (asked[removed], texts.unseen))
        told[name] = area_under_curve(*energies)
    return told


def gap(state: fastkm.MemoryState, other: fastkm.MemoryState) -> float:
    """Largest difference / largest entry, of mean and covariance."""
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(state, other, strict=True))
