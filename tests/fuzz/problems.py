"""Random problems. Every draw of a (seed, number) is the same everywhere."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

# Memories of one problem. The first is drawn; the others are the same but for a few roundings of every entry, so that
# no error is small by luck.
DRAWS = 4
NEARBY = 2.0**-20

OPERATIONS = ("write", "update_posterior", "read", "solve_addressing")
SHARES = (0.5, 0.25, 0.15, 0.1)


class Problems(NamedTuple):
    """Problems of one operation and one shape. Memories DRAWS·i to DRAWS·(i+1) − 1 are problem i."""

    number: int
    operation: str
    inputs: dict[str, Tensor]  # by the operator's names, float32, memory first
    mask: Tensor | None
    times: int  # num_opt_iters of a write, num_iters of a read
    squared_gram: bool
    wide: bool  # scales over eight decades rather than two
    has_cotangent: list[bool]  # for each output

    def __str__(self) -> str:
        sizes = {name: list(x.shape[1:]) for name, x in self.inputs.items()}
        scales = "wide" if self.wide else "ordinary"
        return f"{self.number}: {self.operation} {sizes} times={self.times} squared={self.squared_gram} {scales}"


class Random:
    """One generator and the draws that are made of it."""

    def __init__(self, seed: int, number: int) -> None:
        self.generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        self.normal = functools.partial(torch.randn, generator=self.generator, dtype=torch.float64)
        self.uniform = functools.partial(torch.rand, generator=self.generator, dtype=torch.float64)

    def chance(self, probability: float) -> bool:
        return self.uniform(()).item() < probability

    def choose(self, items, shares):
        return items[torch.multinomial(torch.tensor(shares), 1, generator=self.generator).item()]

    def size(self, most: int) -> int:
        """1 to 3, or anything up to ``most``, small sizes more often."""
        if self.chance(0.3):
            return 1 + int(3 * self.uniform(()).item())
        return round(math.exp(math.log(most) * self.uniform(()).item()))

    def decades(self, *shape: int, least: float, most: float) -> Tensor:
        return 10 ** (least + (most - least) * self.uniform(*shape))

    def rows(self, count: int, rows: int, columns: int, scale: Tensor) -> Tensor:
        """[count, rows, columns]; in some memories all rows are nearly the first."""
        x = self.normal(count, rows, columns)
        apart = self.decades(count, 1, 1, least=-4, most=-1)
        nearly = self.uniform(count, 1, 1) < 0.25
        return scale.view(-1, 1, 1) * torch.where(nearly, x[:, :1] + apart * x, x)

    def covariances(self, count: int, size: int, scale: Tensor) -> Tensor:
        """[count, size, size]: an identity, or one with eigenvalues over up to four decades."""
        basis = torch.linalg.qr(self.normal(count, size, size)).Q
        spread = 10 ** (-self.uniform(count, 1) * 4 * self.uniform(count, size))
        cov = (basis * spread.unsqueeze(1)) @ basis.mT
        plain = self.uniform(count, 1, 1) < 0.4
        return scale.view(-1, 1, 1) * torch.where(plain, torch.eye(size, dtype=torch.float64), (cov + cov.mT) / 2)

    def nearby(self, x: Tensor, symmetric: bool) -> Tensor:
        """float32 [count · DRAWS, …]: every memory, followed by its neighbours."""
        x = x.float().double().repeat_interleave(DRAWS, 0)
        moved = 2 * self.uniform(*x.shape) - 1
        moved[::DRAWS] = 0
        moved = moved.triu() + moved.triu(1).mT if symmetric else moved
        return (x * (1 + NEARBY * moved)).float()


def draw(seed: int, number: int, count: int) -> Problems:
    """``count`` problems."""
    random = Random(seed, number)
    operation = random.choose(OPERATIONS, SHARES)
    wide = random.chance(0.5)
    K, C, T = random.size(48), random.size(48), random.size(40)
    scale = functools.partial(random.decades, count, least=-4 if wide else -1, most=4 if wide else 1)
    variance = functools.partial(random.decades, count, least=-6 if wide else -2, most=4 if wide else 2)
    inputs = {"mean": random.rows(count, K, C, scale())}
    if operation in ("write", "update_posterior"):
        inputs["cov"] = random.covariances(count, K, scale())
    if operation == "update_posterior":
        inputs["weights"] = random.rows(count, T, K, scale() / math.sqrt(K))
    inputs["values" if "cov" in inputs else "queries"] = random.rows(count, T, C, scale())
    if "cov" in inputs:
        inputs["noise_var"] = variance().view(-1, 1) * random.decades(count, T, least=-0.3, most=0.3)
    if operation != "update_posterior":
        inputs["ridge"] = variance()
    masks = "cov" in inputs and random.chance(0.3)
    mask = (random.uniform(count, T) < 0.7).repeat_interleave(DRAWS, 0) if masks else None
    inputs = {name: random.nearby(x, name == "cov") for name, x in inputs.items()}
    times = random.choose((1, 2, 3, 10), (0.6, 0.2, 0.15, 0.05)) if operation in ("write", "read") else 1
    squared = operation != "update_posterior" and random.chance(0.25)
    cotangents = [random.chance(0.7) for _ in range(6)]
    return Problems(number, operation, inputs, mask, min(times, 3) if operation == "write" else times, squared, wide,
                    cotangents)  # fmt: skip
