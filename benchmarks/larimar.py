"""The adapter for Larimar beside a memory that follows Larimar's published equations: `python -m benchmarks.larimar`.

K 512, C 768, T 16, direct writing, identity as prior mean, float32: the sizes of Larimar's configuration. The memory
beside it is plain PyTorch, written from the equations: pseudo-inverses ``A⁺ ← 2 A⁺ − A⁺ A A⁺`` in 15 steps, which start
from ``5e-4 Aᵀ``. First both are verified: what is read must be what was written, and both must have written the least
squares of float64; nothing is timed if one is wrong. Then a write, a read, and both are timed in turns.
"""

import argparse
import os
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import keep_freed_memory, pin
from fastkm.adapters.larimar import GPM
from fastkm.cli.console import markdown_table
from fastkm.testing.timing import time_in_turn

STEPS, START = 15, 5e-4
ALLOWED = 1e-4  # of the largest entry; steps and solves are both near 1e-6
TARGET = 10


def pseudo_inverse(A: Tensor, steps: int = STEPS) -> Tensor:
    """Newton and Schulz: an error of ``(1 − 5e-4 s²)^(2^steps)`` along a singular vector with singular value s."""
    inverse = START * A.mT
    for _ in range(steps):
        inverse = 2 * inverse - inverse @ A @ inverse
    return inverse


class Equations:
    """Direct writing and deterministic reading, without noise; codes ``[T, B, C]``."""

    def __init__(self, prior_mean: Tensor, steps: int = STEPS) -> None:
        self.prior_mean, self.steps = prior_mean, steps  # [K, C]

    def write(self, codes: Tensor) -> Tensor:
        """``W = Z R0⁺``, ``M = W⁺ Z`` ``[B, K, C]``. Each memory has a copy of the prior, as Larimar's have."""
        values = codes.transpose(0, 1)
        prior = self.prior_mean.repeat(values.shape[0], 1, 1)
        weights = values @ pseudo_inverse(prior, self.steps)
        return pseudo_inverse(weights, self.steps) @ values

    def read(self, codes: Tensor, memory: Tensor) -> Tensor:
        """``(z M⁺) M``."""
        weights = codes.transpose(0, 1) @ pseudo_inverse(memory, self.steps)
        return (weights @ memory).transpose(0, 1)


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).abs().max() / truth.abs().max())


def verify(name: str, memory: Tensor, values: Tensor, codes: Tensor, truth: Tensor) -> tuple[str, str, str]:
    errors = error(memory, truth), error(values, codes.double())
    if max(errors) > ALLOWED:
        raise SystemExit(f"{name} is wrong, so that nothing was timed: {errors[0]:.1e} {errors[1]:.1e}")
    return name, *(f"{x:.1e}" for x in errors)


@torch.no_grad()
def compare(K: int, C: int, T: int, batch: int, seconds: float) -> float:
    """Prints errors and times; returns how many times as fast a write and a read are together."""
    codes = torch.randn(T, batch, C, generator=torch.Generator().manual_seed(0))
    gpm = GPM(C, K, True, False, STEPS, identity=True, deterministic=True)
    equations = Equations(gpm.memory_mean)
    weights = codes.double().transpose(0, 1) @ torch.linalg.pinv(gpm.memory_mean.double())
    truth = torch.linalg.pinv(weights) @ codes.double().transpose(0, 1)
    state, written = gpm.write_to_memory(codes)[0], equations.write(codes)
    rows = [
        verify("GPM", state.mean, gpm.read_with_encoded_input(codes, state)[0], codes, truth),
        verify("equations", written, equations.read(codes, written), codes, truth),
    ]
    print(markdown_table(("error, relative to the largest entry", "M = W⁺ Z", "codes read again"), rows))

    candidates: dict[str, Callable[[], object]] = {
        "equations, write": lambda: equations.write(codes),
        "GPM, write": lambda: gpm.write_to_memory(codes),
        "equations, read": lambda: equations.read(codes, written),
        "GPM, read": lambda: gpm.read_with_encoded_input(codes, state),
    }
    times = {name: timing.median for name, timing in time_in_turn(candidates, seconds).items()}
    whole = {name: times[f"{name}, write"] + times[f"{name}, read"] for name in ("equations", "GPM")}
    spent = [*((name, times[f"equations, {name}"], times[f"GPM, {name}"]) for name in ("write", "read"))]
    spent.append(("both", whole["equations"], whole["GPM"]))
    rows = [(name, f"{theirs * 1e3:.1f}", f"{ours * 1e3:.1f}", f"{theirs / ours:.1f}×") for name, theirs, ours in spent]
    print()
    print(markdown_table(("ms a call, median", "equations", "GPM", "ratio"), rows))
    return whole["equations"] / whole["GPM"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="K")
    parser.add_argument("--columns", type=int, default=768, help="C")
    parser.add_argument("--patterns", type=int, default=16, help="T")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    print(f"threads: {pin(options.threads)}; freed memory: {keep_freed_memory()}")
    print(f"K {options.rows}, C {options.columns}, T {options.patterns}, B {options.batch}, float32")
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}\n")
    ratio = compare(options.rows, options.columns, options.patterns, options.batch, options.seconds)
    print(f"\npromised: {TARGET}×; {'met' if ratio >= TARGET else 'missed'}")


if __name__ == "__main__":
    main()
