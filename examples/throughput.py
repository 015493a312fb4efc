"""How many reads a second does my machine do?

Reads of one memory are timed for more and more queries at once. For numbers that you can quote, use `make bench`: it
verifies before it times and takes candidates in turns.
"""

import argparse
import time

import torch

import fastkm

K, C, SECONDS = 64, 200, 0.1


def main(queries: list[int], picture: str | None = None) -> dict[int, float]:
    torch.manual_seed(0)
    mean = torch.randn(1, K, C)
    rates = {}
    for count in queries:
        cues = torch.randn(1, count, C)
        fastkm.read(mean, cues, ridge=1.0)  # the first call warms up
        calls, start = 0, time.perf_counter()
        while time.perf_counter() - start < SECONDS:
            fastkm.read(mean, cues, ridge=1.0)
            calls += 1
        rates[count] = calls * count / (time.perf_counter() - start)
        print(f"{count:>6} queries a call: {rates[count]:>12,.0f} reads a second")
    if picture:
        draw(picture, rates)
    return rates


def draw(picture: str, rates: dict[int, float]) -> None:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    axis.loglog(list(rates), list(rates.values()), "o-")
    axis.set(xlabel="queries a call", ylabel="reads a second", title=f"one memory, K = {K}, C = {C}")
    axis.grid(True, which="both", alpha=0.3)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 10, 100, 1_000, 10_000])
    parser.add_argument("--picture", help="where to draw the rates")
    main(**vars(parser.parse_args()))
