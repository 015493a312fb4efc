"""What the machine can do, measured in the same run, and what an operation cannot do without."""

import math
import time

import torch

from fastkm._runtime import counts
from fastkm.testing import roofline
from fastkm.testing.operations import Case
from fastkm.testing.presets import Preset
from fastkm.testing.timing import clock

SIZES = (512, 1024, 2048)  # of the matrices whose product is timed
COPIED = 2**27  # bytes; far more than any cache holds
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Ceiling:
    """The best product rate of every dtype (operations a second) and copy bandwidth (bytes a second) met so far."""

    def __init__(self) -> None:
        self.product = dict.fromkeys(DTYPES, 0.0)
        self.product_at = dict.fromkeys(DTYPES, 0)
        self.bandwidth = 0.0
        self.history: list[dict[str, float]] = []
        self.last = -math.inf

    def measure(self, repeats: int = 3) -> None:
        """Products of all sizes and copies in turn; called at the start, in between and at the end of a run."""
        now = dict.fromkeys((*DTYPES, "copy"), 0.0)
        operands = {
            (name, n): [torch.rand(n, n, dtype=dtype) for _ in range(3)]
            for name, dtype in DTYPES.items()
            for n in SIZES
        }
        source, target = torch.ones(COPIED // 4), torch.zeros(COPIED // 4)
        for _ in range(repeats):
            for (name, n), (a, b, out) in operands.items():
                rate = 2 * n**3 / clock(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), max(1, 1024**2 // n**2))
                now[name] = max(now[name], rate)
                if rate > self.product[name]:
                    self.product[name], self.product_at[name] = rate, n
            now["copy"] = max(now["copy"], 2 * COPIED / clock(lambda: target.copy_(source)))  # read and written
        self.bandwidth = max(self.bandwidth, now["copy"])
        self.history.append(now)
        self.last = time.monotonic()

    def describe(self) -> str:
        products = (
            f"{name} {rate / 1e9:.0f} Gflop/s at {self.product_at[name]}²" for name, rate in self.product.items()
        )
        return f"matrix product {', '.join(products)}; copy {self.bandwidth / 1e9:.1f} GB/s, read and written"


def update_in_block_form(K: int, C: int, T: int) -> int:
    """V = W U; S = V Wᵀ, a triangle; its Cholesky factor; G = L⁻¹V; W R; E = L⁻¹(Z − W R); GᵀE; GᵀG, a triangle."""
    return (
        counts.product(T, K, K)
        + counts.symmetric_product(T, K)
        + counts.third(T)
        + counts.triangular_solve(T, K)
        + counts.product(T, C, K)
        + counts.triangular_solve(T, C)
        + counts.product(K, C, T)
        + counts.symmetric_product(K, T)
    )


def flops(case: Case, preset: Preset, queries: int) -> int:
    """Operations a memory: the block form's for an update, else the fewest by which we know to compute it."""
    _, K, C, T = preset
    operators = case.operators
    if case.operation == "update_posterior":
        return update_in_block_form(K, C, T) + sum(sum(o.flops(K, C, T, queries)) for o in operators[1:])
    return sum(sum(operator.flops(K, C, T, queries)) for operator in operators)


def least_bytes(case: Case, preset: Preset, batch: int, queries: int, dtype: str) -> int:
    """Every input read once and every output written once, of the backward too."""
    moved = sum(
        roofline.bytes_to_move(operator.name, roofline.inputs(operator.name, preset, batch, queries))
        for operator in case.operators
    )
    return moved * DTYPES[dtype].itemsize // torch.float32.itemsize
