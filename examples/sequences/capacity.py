"""How many pairs does one trained layer hold? The synthetic task of Schlag, Irie and Schmidhuber, 2021.

A sequence shows pairs of a key and a value; then one key is asked for. Setting 1 shows each of S keys once. Setting 2
draws 2 S pairs with replacement, and the last value of a key counts. Keys of size 64 are learned from key and value,
queries from the key, and values are one-hot vectors. Batches, learning rate and the rule to stop are of the paper's
program; the layers that are trained here differ in what is written and read.
"""

import math
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot, softplus

from examples.sequences import baselines
from examples.sequences.saved import Record, find, spread, train_missing
from fastkm import MemoryState, filter_posterior, update_posterior
from fastkm.cli.console import markdown_table

SIZE, BATCH, TESTED, EVERY, STRIKES, SOLVED = 64, 32, 20, 100, 10, 1e-3
MOST_STEPS, SEEDS = 3_000, (1, 2, 3)
PAIRS = {1: (20, 60, 100, 200, 300, 600), 2: (20, 60, 100, 200)}
LAYERS = {1: ("linear, sum", "exact", "exact, DPFP-1"), 2: ("linear, delta rule", "exact", "exact, retention")}
FILE = "sequences-capacity.json"

PAGE = """## The capacity of a trained layer

The synthetic task of Schlag, Irie and Schmidhuber, 2021: a sequence shows S keys with values, one key is asked for, and
the loss is ½ ‖answer − value‖² for one-hot values. Keys of size {SIZE} are learned from key and value, queries from the
key. Batches of {BATCH}, Adam at 0.001, a test every {EVERY} steps; a training ends at a loss of {SOLVED}, or after more
than {STRIKES} tests without a lower one, or here after {MOST_STEPS:,} steps (there 100,000). The least test loss, over
{seeds} seeds; a figure without a spread is one run, and a dash stands where none is saved yet:
`python -m examples.sequences capacity` trains what the saved results lack. Rows called "published" are
single runs of the paper's authors, read from the logs beside their program. Their test counts the last, smaller part of
a batch as much as the others and asks for at most 200 keys; here all keys count the same.

Setting 1, every key once. No memory of K rows can have less than ½ (1 − K/S): its answers to S keys are a matrix of
rank K. The exact layer has this least loss without training where queries are the keys and σ² is small. So beyond S = K
the table shows how close a training comes to it, and how fast. Linear features are {SIZE} rows, DPFP-ν features
2ν times as many; softmax attention keeps all pairs.

{setting_1}

Steps until the loss was {SOLVED}, for the runs that came so far:

{steps_1}

Setting 2, 2 S pairs drawn with replacement; the last value of a key counts. The test has sequences of S pairs, as the
paper's program has.

{setting_2}

{steps_2}

```{{image}} ../images/sequences_capacity.png
:alt: least test loss of every layer, by the number of keys, in both settings
:width: 90%
```
"""

# The least test loss in synthetic/logs of github.com/ischlag/fast-weight-transformers, one run each, by setting and S.
PUBLISHED = {
    1: {
        "linear, sum": (0.0009, 0.0245, 0.1642, 0.3420, 0.3971, 0.4513),
        "DPFP-1, sum": (0.0008, 0.0004, 0.0002, 0.1732, 0.2855, 0.4109),
        "DPFP-2, sum": (0.0003, 0.0010, 0.0005, 0.0004, 0.0681, 0.3234),
        "DPFP-3, sum": (0.0005, 0.0005, 0.0005, 0.0009, 0.0003, 0.1984),
        "softmax": (0.0006, 0.0001, 0.0000, 0.0000, 0.0000, 0.0303),
    },
    2: {
        "linear, delta rule": (0.0008, 0.0005, 0.1502, 0.3415),
        "DPFP-1, sum": (0.0973, 0.1026, 0.1113, 0.2310),
        "DPFP-1, delta rule": (0.0008, 0.0049, 0.0001, 0.1709),
        "DPFP-2, delta rule": (0.0010, 0.0005, 0.0854, 0.0008),
        "tanh, fast weight memory": (1.4970, 9.0210, 42.42, 95.51),
    },
}


class Task(NamedTuple):
    setting: int
    pairs: int  # S
    length: int

    def draw(self, sequences: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which key and which value every step shows [sequences, length]."""
        if self.setting == 1:
            order = torch.rand(2, sequences, self.pairs, generator=generator).argsort(-1)
            return order[0], order[1]
        drawn = torch.randint(self.pairs, (2, sequences, self.length), generator=generator)
        return drawn[0], drawn[1]


def last_value(keys: Tensor, values: Tensor, asked: Tensor) -> Tensor:
    """The value that each asked key [B, Q] was last shown with; −1 for a key that was not shown."""
    step = torch.arange(1, keys.shape[1] + 1) * (keys.unsqueeze(1) == asked.unsqueeze(2))
    last = step.amax(-1)
    return torch.where(last > 0, values.gather(1, (last - 1).clamp_min(0)), -1)


class OfPair(nn.Module):
    """A linear map of a pair: of the key's embedding beside the one-hot value."""

    def __init__(self, width: int, pairs: int, size: int, bound: float) -> None:
        super().__init__()
        self.of_key, self.of_value = nn.Linear(width, size), nn.Embedding(pairs, size)
        for weight in (self.of_key.weight, self.of_value.weight):
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, embeddings: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.of_key(embeddings)[keys] + self.of_value(values)


class Layer(nn.Module):
    """Embeddings of keys, projections, and a memory that is read after the last step."""

    def __init__(self, name: str, pairs: int) -> None:
        super().__init__()
        width = int(2.2 * pairs)
        self.name, self.pairs = name, pairs
        self.embeddings = nn.Parameter(torch.randn(pairs, width))
        bound = 1 / math.sqrt(SIZE)
        self.key, self.query = OfPair(width, pairs, SIZE, bound), nn.Linear(width, SIZE)
        nn.init.uniform_(self.query.weight, -bound, bound)
        # β of the delta rule; of the exact layers σ², and retention where it is learned
        gates = {"linear, sum": 0, "exact, retention": 2}.get(name, 1)
        self.gates = OfPair(width, pairs, gates, 1 / math.sqrt(width + pairs)) if gates else None
        self.log_prior_var = nn.Parameter(torch.zeros(())) if name.startswith("exact") else None
        if self.log_prior_var is not None and self.gates is not None:  # σ² = 0.1 and α = 0.99, as in KanervaMixer
            start = torch.tensor([math.log(math.expm1(0.09)), -math.log(math.expm1(0.01))])
            with torch.no_grad():
                self.gates.of_key.bias.copy_(start[:gates])

    def forward(self, keys: Tensor, values: Tensor, asked: Tensor) -> Tensor:
        """The reads [B, Q, S] of the keys that are asked for [B, Q]."""
        k, q = self.key(self.embeddings, keys, values), self.query(self.embeddings)[asked]
        v = one_hot(values, self.pairs).to(k.dtype)
        if self.gates is None:
            return baselines.normalised_sum_last(baselines.elu_plus_one(k), v, baselines.elu_plus_one(q))
        gates = self.gates(self.embeddings, keys, values)
        if self.log_prior_var is None:
            k, q = (normalize(baselines.elu_plus_one(x), p=1, dim=-1) for x in (k, q))
            return baselines.delta_rule_last(k, v, q, gates[..., 0].sigmoid())
        if self.name == "exact, DPFP-1":
            k, q = baselines.dpfp(k, 1), baselines.dpfp(q, 1)
        return self._exact(normalize(k, dim=-1), v, normalize(q, dim=-1), gates)

    def _exact(self, k: Tensor, v: Tensor, q: Tensor, gates: Tensor) -> Tensor:
        """The posterior mean; with retention, the memory forgets a part of all it holds at every step."""
        B, K, C = len(k), k.shape[-1], v.shape[-1]
        u = self.log_prior_var.exp()
        prior = MemoryState(k.new_zeros(B, K, C), u * torch.eye(K).repeat(B, 1, 1))
        noise_var = 1e-2 + softplus(gates[..., 0])
        if gates.shape[-1] == 1:
            return q @ update_posterior(prior, k, v, noise_var).state.mean
        retention = gates[..., 1].sigmoid()
        made = filter_posterior(prior, k, v, k, noise_var, retention=retention, prior_var=u)
        return q @ made.state.mean


def errors(layer: Layer, keys: Tensor, values: Tensor, asked: Tensor) -> Tensor:
    """½ ‖read − one-hot answer‖² of every key asked for that was shown."""
    answers = last_value(keys, values, asked)
    shown = answers >= 0
    wanted = one_hot(answers[shown], layer.pairs)
    return 0.5 * (layer(keys, values, asked)[shown] - wanted).square().sum(-1)


@torch.no_grad()
def evaluate(layer: Layer, task: Task, generator: torch.Generator) -> float:
    """The mean error over all keys of some sequences, of S steps in both settings, as in the paper's program."""
    keys, values = task._replace(length=task.pairs).draw(TESTED, generator)
    return errors(layer, keys, values, torch.arange(task.pairs).repeat(TESTED, 1)).mean().item()


def train(layer: str, setting: int, pairs: int, seed: int, most_steps: int = MOST_STEPS) -> Record:
    """Train until the test loss is 0.001, or has not been the least for more than ten tests, or the steps are over."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    task, model = Task(setting, pairs, setting * pairs), Layer(layer, pairs)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    first = evaluate(model, task, generator)
    least, strikes, step = math.inf, 0, 0
    while step < most_steps and least > SOLVED and strikes <= STRIKES:
        for _ in range(EVERY):
            keys, values = task.draw(BATCH, generator)
            asked = keys.gather(1, torch.randint(keys.shape[1], (BATCH, 1), generator=generator))
            optimizer.zero_grad()
            errors(model, keys, values, asked).mean().backward()
            optimizer.step()
        step += EVERY
        found = evaluate(model, task, generator)
        least, strikes = (found, 0) if found < least else (least, strikes + 1)
    stopped = "solved" if least <= SOLVED else "no progress" if strikes > STRIKES else "most steps"
    return {"first": first, "loss": least, "steps": step, "stopped": stopped}


def runs() -> list[Record]:
    """Up to 60 pairs all seeds; then, as runs take minutes, one seed of every size before the next seed."""
    every = [
        {"layer": layer, "setting": setting, "pairs": pairs, "seed": seed}
        for seed in SEEDS
        for setting in (1, 2)
        for pairs in PAIRS[setting]
        for layer in LAYERS[setting]
        if pairs < 600 or layer != "exact, DPFP-1"
    ]
    return sorted(every, key=lambda run: (run["seed"] * (run["pairs"] > 60), run["pairs"]))


def main(folder: Path) -> list[Record]:
    """Train what is not yet saved under ``folder``, the documentation's."""
    return train_missing(folder / "results" / FILE, runs(), train)


# ---- the page -------------------------------------------------------------------------------------------------------


def losses(records: list[Record], setting: int, layer: str) -> list[list[float]]:
    """The least test loss of every seed, for each number of pairs."""
    return [
        [record["loss"] for record in find(records, setting=setting, layer=layer, pairs=pairs)]
        for pairs in PAIRS[setting]
    ]


def rows(records: list[Record], setting: int) -> list[tuple[str, ...]]:
    trained = [(layer, *map(spread, losses(records, setting, layer))) for layer in LAYERS[setting]]
    told = [(f"{layer} (published)", *(f"{x:.4f}" for x in line)) for layer, line in PUBLISHED[setting].items()]
    least = [
        (f"the least that {K} rows allow", *(f"{max(0, 0.5 - 0.5 * K / S):.4f}" for S in PAIRS[1]))
        for K in (SIZE, 2 * SIZE, 4 * SIZE, 6 * SIZE)
    ]
    return trained + told + (least if setting == 1 else [])


def step_rows(records: list[Record], setting: int) -> list[tuple[str, ...]]:
    """Steps until the task was solved, and how many of the runs solved it."""
    lines = []
    for layer in LAYERS[setting]:
        cells = []
        for pairs in PAIRS[setting]:
            run = find(records, setting=setting, layer=layer, pairs=pairs)
            steps = [record["steps"] for record in run if record["stopped"] == "solved"]
            cells.append(f"{spread(steps, '.0f')} ({len(steps)} of {len(run)})" if run else "–")
        lines.append((layer, *cells))
    return lines


def section(records: list[Record]) -> str:
    tables = {}
    for setting in LAYERS:
        headers = ("layer", *(f"S = {S}" for S in PAIRS[setting]))
        tables[f"setting_{setting}"] = markdown_table(headers, rows(records, setting))
        tables[f"steps_{setting}"] = markdown_table(headers, step_rows(records, setting))
    sizes = {"SIZE": SIZE, "BATCH": BATCH, "EVERY": EVERY, "SOLVED": SOLVED, "STRIKES": STRIKES}
    return PAGE.format(**tables, **sizes, MOST_STEPS=MOST_STEPS, seeds=len(SEEDS))


def draw_picture(records: list[Record], path: str) -> None:
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    for axes, setting in zip(both, LAYERS, strict=True):
        for layer, line in PUBLISHED[setting].items():
            axes.plot(PAIRS[setting], line, ":", linewidth=1.5, label=f"{layer} (published)")
        for layer in LAYERS[setting]:
            found = losses(records, setting, layer)
            seen = [(S, statistics.mean(x)) for S, x in zip(PAIRS[setting], found, strict=True) if x]
            axes.plot([S for S, _ in seen], [x for _, x in seen], "o-", label=layer)
        axes.set(xlabel="S", title=f"setting {setting}", ylim=(0, 0.55))
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    both[0].set_ylabel("least test loss")
    figure.savefig(path, dpi=110)
