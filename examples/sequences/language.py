"""A language model of two layers on multi-query associative recall, trained: does it matter how tokens are mixed?

The task of Zoology (Arora et al., 2023): a sequence begins with pairs of a key token and a value token; later some
tokens are keys again, and the next token to forecast there is the key's value. All other tokens are random. All models
have the same embeddings, projections, short convolutions, gates and norms, and differ in what a head does with its
queries, keys and values.
"""

import math
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, silu

from examples.sequences import baselines
from examples.sequences.saved import Record, find, spread, train_missing
from fastkm.cli.console import markdown_table
from fastkm.nn import KanervaMixer

SIZE, HEADS, HEAD, LAYERS, TOKENS = 64, 2, 32, 2, 1_024  # tokens of a batch
MIXERS = ("exact", "exact, no retention", "softmax attention", "delta rule", "linear attention")
SEEDS, RATES = (1, 2, 3), (4e-3, 2e-3)
FILE = "sequences-language.json"

PAGE = """## A language model on multi-query recall, trained

The task of Zoology (Arora et al., 2023): a sequence begins with pairs of a key and a value token; later some tokens are
keys again, and the model forecasts the value that follows. Two layers of size {SIZE}, each an RMS norm and a mixer of
{HEADS} heads with keys of size {HEAD} and a short convolution; no MLP; the output has the embeddings' weights. "exact"
is `KanervaMixer` as it is; without retention it differs from the delta rule in what a head computes, and has one number
a head more. Embeddings, projections, convolution, gate and norm are the same in all models.

Not as in Zoology: every batch is new (1,024 tokens) and has a number of pairs from 1, 2, 4, … to the largest of the
table, and after a key that is asked for stands its value, not a random token. The tests have 256 sequences that ask for
every key once. AdamW, a weight decay of 0.1, a warm-up, a cosine. Rates {rates} with {seeds} seeds each; a table shows
the rate with the better recall of the most pairs among those that most seeds are saved of, and how many these are.
`python -m examples.sequences language` trains what the saved results lack.

Where the keys of a sequence are all alike, the exact layer has little to tell them apart by. Rank is of the Gram matrix
of a head's keys in a sequence, as a mean over heads and sequences, in layers 1 / 2: stable is Σλ / max λ, effective is
the exponential of the entropy of λ / Σλ; both are from 1 to {HEAD}.

{tables}

```{{image}} ../images/sequences_language.png
:alt: recall of every model while it is trained
:width: 90%
```
"""


class Task(NamedTuple):
    vocabulary: int = 256
    length: int = 64
    pairs: tuple[int, ...] = (1, 2, 4, 8, 16)  # each batch of the training has one of these; tests have the last three
    steps: int = 1_200

    def draw(self, sequences: int, pairs: int, asked: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens [B, length], and what follows where a key is asked for; −100 elsewhere."""
        half, begin = self.vocabulary // 2, 2 * pairs
        keys = 1 + torch.rand(sequences, half - 1, generator=generator).argsort(-1)[:, :pairs]
        values = half + torch.rand(sequences, half, generator=generator).argsort(-1)[:, :pairs]
        space = (self.length - begin) // 2
        likely = torch.arange(1, space + 1).pow(-0.99)  # most keys are asked for early: a power law
        where = begin + 2 * torch.multinomial(likely.expand(sequences, -1), asked, generator=generator)
        which = (torch.arange(asked) % pairs).expand(sequences, -1)
        tokens = torch.randint(self.vocabulary, (sequences, self.length), generator=generator)
        tokens[:, 0:begin:2], tokens[:, 1:begin:2] = keys, values
        key, value = keys.gather(1, which), values.gather(1, which)
        tokens = tokens.scatter(1, where, key).scatter(1, where + 1, value)
        return tokens, torch.full_like(tokens, -100).scatter(1, where, value)


TASKS = {
    "256, 64": Task(),
    "256, 256": Task(length=256, pairs=(1, 2, 4, 8, 16, 32, 64)),
    "8,192, 64": Task(vocabulary=8_192),
}


class Mixer(nn.Module):
    """What :class:`KanervaMixer` has around its memory, with another layer of the literature in its place."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule, inner = rule, HEADS * HEAD
        self.qkv_proj = nn.Linear(SIZE, 3 * inner, bias=False)
        self.conv = nn.Conv1d(3 * inner, 3 * inner, 4, groups=3 * inner, bias=False)
        self.beta_proj = nn.Linear(SIZE, HEADS) if rule == "delta rule" else None
        self.gate_proj = nn.Linear(SIZE, inner, bias=False)
        self.norm, self.o_proj = nn.RMSNorm(HEAD, eps=1e-5), nn.Linear(inner, SIZE, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None, None]:
        whole = nn.functional.pad(self.qkv_proj(x).mT, (3, 0))
        q, k, v = heads(self.conv(whole))
        if self.rule == "softmax attention":
            read = baselines.softmax_causal(k, v, q)
        elif self.rule == "linear attention":
            read = baselines.normalised_sum_causal(baselines.elu_plus_one(k), v, baselines.elu_plus_one(q))
        else:
            beta = self.beta_proj(x).sigmoid().mT
            read = baselines.delta_rule_causal(normalize(k, dim=-1), v, normalize(q, dim=-1), beta)
        gated = self.norm(read).transpose(1, 2).flatten(2) * silu(self.gate_proj(x))
        return self.o_proj(gated), None, None


def heads(convolved: Tensor) -> list[Tensor]:
    """Queries, keys and values [B, H, T, K] of what the convolution made [B, 3 H K, T]."""
    return [part.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for part in silu(convolved.mT).chunk(3, -1)]


class Model(nn.Module):
    def __init__(self, mixer: str, vocabulary: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, SIZE)  # also of the output
        nn.init.normal_(self.embeddings.weight, std=0.02)
        self.mixers = nn.ModuleList(
            KanervaMixer(SIZE, HEADS, HEAD, use_retention=mixer == "exact")
            if mixer.startswith("exact")
            else Mixer(mixer)
            for _ in range(LAYERS)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(SIZE) for _ in range(LAYERS + 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embeddings(tokens)
        for norm, mixer in zip(self.norms[:LAYERS], self.mixers, strict=True):
            x = x + mixer(norm(x))[0]
        return self.norms[LAYERS](x)

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.embeddings.weight.mT


def loss_and_share(model: Model, tokens: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and the share that is right, where an answer is due."""
    due = answers >= 0
    logits = model.logits(model(tokens)[due])
    return cross_entropy(logits, answers[due]), (logits.argmax(-1) == answers[due]).float().mean()


def ranks(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Stable and effective rank of keys [..., T, K] of length 1: what is their Gram matrix spread over?

    With its eigenvalues λ: Σλ / max λ, and the exponential of the entropy of λ / Σλ. Both are 1 for keys that are all
    the same, and K for keys that are spread evenly.
    """
    share = torch.linalg.svdvals(normalize(keys.double(), dim=-1)).square()
    share = share / share.sum(-1, keepdim=True)
    return 1 / share.amax(-1), torch.special.entr(share).sum(-1).exp()


@torch.no_grad()
def evaluate(model: Model, task: Task, pairs: int, sequences: int = 256) -> tuple[float, list[list[float]]]:
    """Share right where each key is asked for once, and the two ranks of a sequence's keys in every layer.

    The ranks are means over heads and sequences. All tests have the same sequences.
    """
    ranked: list[list[float]] = []
    hooks = [
        mixer.conv.register_forward_hook(
            lambda _, __, convolved: ranked.append([x.mean().item() for x in ranks(heads(convolved)[1])])
        )
        for mixer in model.mixers
    ]
    generator = torch.Generator().manual_seed(10_000)
    share = loss_and_share(model, *task.draw(sequences, pairs, pairs, generator))[1].item()
    for hook in hooks:
        hook.remove()
    return share, ranked


def train(task: str, mixer: str, rate: float, seed: int) -> Record:
    """AdamW with a tenth of the steps to warm up, then a cosine to zero; every batch is new."""
    sizes = TASKS[task]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Model(mixer, sizes.vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step / sizes.steps))
    most, before = sizes.pairs[-1], evaluate(model, sizes, sizes.pairs[-1])[1]
    curve = []
    for step in range(1, sizes.steps + 1):
        pairs = sizes.pairs[int(torch.randint(len(sizes.pairs), (1,), generator=generator))]
        batch = sizes.draw(TOKENS // sizes.length, pairs, max(pairs, sizes.length // 4), generator)
        optimizer.zero_grad()
        loss_and_share(model, *batch)[0].backward()
        optimizer.step()
        schedule.step()
        if step % max(1, sizes.steps // 20) == 0:
            curve.append(round(evaluate(model, sizes, most, 32)[0], 4))
    return {
        "parameters": sum(x.numel() for x in model.parameters()),
        "shares": [evaluate(model, sizes, pairs)[0] for pairs in sizes.pairs[-3:]],
        "ranks before": before,
        "ranks": evaluate(model, sizes, most)[1],
        "curve": curve,
    }


def learning_rate(done: float) -> float:
    """Of its largest, after this share of the steps."""
    return done / 0.1 if done < 0.1 else 0.5 + 0.5 * math.cos(math.pi * done)


def runs() -> list[Record]:
    return [
        {"task": task, "mixer": mixer, "rate": rate, "seed": seed}
        for task in TASKS
        for rate in RATES
        for seed in SEEDS
        for mixer in MIXERS
    ]


def main(folder: Path) -> list[Record]:
    """Train what is not yet saved under ``folder``, the documentation's."""
    return train_missing(folder / "results" / FILE, runs(), train)


# ---- the page -------------------------------------------------------------------------------------------------------


def best(records: list[Record], task: str, mixer: str) -> list[Record]:
    """The seeds at the rate with the higher recall of the most pairs, among the rates with most seeds."""
    tried = [find(records, task=task, mixer=mixer, rate=rate) for rate in RATES]
    return max(tried, key=lambda runs: (len(runs), statistics.mean([run["shares"][-1] for run in runs] or [0.0])))


def rows(records: list[Record], task: str) -> list[tuple[str, ...]]:
    """Recall in percent, and ranks of the keys: mean and standard deviation over seeds."""
    lines = []
    for mixer in MIXERS:
        runs = best(records, task, mixer)
        if not runs:
            continue
        shares = [spread([100 * run["shares"][i] for run in runs], ".1f") for i in range(3)]
        by_rank = [
            " / ".join(spread([run[when][layer][kind] for run in runs], ".1f") for layer in range(LAYERS))
            for kind, when in ((0, "ranks"), (1, "ranks"), (1, "ranks before"))
        ]
        lines.append((mixer, f"{runs[0]['parameters']:,}", f"{runs[0]['rate']:g}", str(len(runs)), *shares, *by_rank))
    return lines


def section(records: list[Record]) -> str:
    tables = []
    for task, sizes in TASKS.items():
        if lines := rows(records, task):
            recalled = (f"{pairs} pairs, %" for pairs in sizes.pairs[-3:])
            headers = ("mixer", "parameters", "rate", "seeds", *recalled, "stable rank", "effective rank", "before")
            title = f"A vocabulary of {sizes.vocabulary:,}, {sizes.length} tokens, {sizes.steps:,} steps:"
            tables.append(f"{title}\n\n{markdown_table(headers, lines)}")
    text = "\n\n".join(tables) or "No training has been saved."
    return PAGE.format(
        tables=text, SIZE=SIZE, HEADS=HEADS, HEAD=HEAD, seeds=len(SEEDS), rates=" and ".join(map(str, RATES))
    )


def draw_picture(records: list[Record], path: str) -> None:
    from matplotlib import pyplot

    shown = {task: sizes for task, sizes in TASKS.items() if find(records, task=task)}
    figure, every = pyplot.subplots(1, max(1, len(shown)), figsize=(9, 3.6), layout="constrained", squeeze=False)
    for axes, (task, sizes) in zip(every[0], shown.items(), strict=False):  # with nothing saved, one empty picture
        for number, mixer in enumerate(MIXERS):
            axes.plot([], [], color=f"C{number}", label=mixer)
            for run in best(records, task, mixer):
                steps = [(j + 1) * sizes.steps / len(run["curve"]) for j in range(len(run["curve"]))]
                axes.plot(steps, run["curve"], color=f"C{number}", linewidth=1)
        title = f"vocabulary {sizes.vocabulary:,}, {sizes.length} tokens, {sizes.pairs[-1]} pairs"
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="steps", ylabel="share recalled", ylim=(0, 1.03))
    if shown:
        figure.legend(*every[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(MIXERS))
    figure.savefig(path, dpi=110)
