"""``python -m examples.dkm.demo``: held-out images stored, corrupted and cleaned up, in three pictures."""

import argparse
from pathlib import Path

import torch

from examples.dkm import pictures
from examples.dkm.evaluation import capacity, draw_episodes
from examples.dkm.patterns import CORRUPTIONS
from examples.dkm.study import NUM_ITERS, capacity_table, open_checkpoint
from fastkm.cli.console import add_threads, check_writable, exit_status
from fastkm.testing.extras import import_extra

PROGRAM = "python -m examples.dkm.demo"
SHOWN = ("salt and pepper 15 %", "a quarter occluded", "Gaussian 0.3")
SHIPPED = Path(__file__).with_name("mnist.safetensors")


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog=PROGRAM, description="Held-out images stored, corrupted and cleaned up, in three pictures."
    )
    command.add_argument("--checkpoint", default=SHIPPED, metavar="FILE", help="(default: the one for MNIST beside it)")
    command.add_argument("--output", default="results", metavar="FOLDER", help="(default: %(default)s)")
    add_threads(command)
    return command


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    folder = Path(options.output)
    reads, samples, capacities = (folder / f"demo_{name}.png" for name in ("reads", "samples", "capacity"))
    import_extra("matplotlib")
    check_writable(reads, samples, capacities)
    one = open_checkpoint(Path(options.checkpoint))
    model, data = one.model, one.data
    episode = draw_episodes(data.test, 1, model.memory.memory_size, seed=0)
    corruptions = {name: CORRUPTIONS[name] for name in SHOWN}
    pictures.draw_reads(model, episode, corruptions, reads)
    pictures.draw_samples(model, episode, NUM_ITERS, samples)
    rows = capacity(model, data.train, data.test, NUM_ITERS, longest=64, drawn=128)
    capacity_table(data.source, model.memory.memory_size, rows).show()
    pictures.draw_capacity(rows, capacities)
    print(f"Pictures: demo_reads.png, demo_samples.png and demo_capacity.png in {folder}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    return exit_status(PROGRAM, run, parser().parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
