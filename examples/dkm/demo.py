"""``python -m examples.dkm.demo``: held-out images stored, corrupted and cleaned up, in three pictures."""

import argparse
import os
from pathlib import Path

import torch

from examples.dkm import pictures
from examples.dkm.evaluation import capacity, draw_episodes
from examples.dkm.patterns import CORRUPTIONS, Patterns, load_patterns
from examples.dkm.study import NUM_ITERS, capacity_table
from examples.dkm.train import train
from examples.dkm.training import Settings, Trainer, fingerprint, load_model
from fastkm.cli.console import add_threads, check_writable, exit_status
from fastkm.models import DynamicKanervaMachine
from fastkm.testing.extras import UserError, import_extra

PROGRAM = "python -m examples.dkm.demo"
SHOWN = ("salt and pepper 15 %", "a quarter occluded", "Gaussian 0.3")
QUICK = Settings(steps=600)  # a few minutes


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog=PROGRAM, description="Held-out images stored, corrupted and cleaned up, in three pictures."
    )
    command.add_argument("--checkpoint", default="results/mnist.safetensors", metavar="FILE",
                         help="without it a few minutes of training come first (default: %(default)s)")  # fmt: skip
    command.add_argument("--output", default="results", metavar="FOLDER", help="(default: %(default)s)")
    add_threads(command)
    return command


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    folder = Path(options.output)
    reads, samples, capacities = (folder / f"demo_{name}.png" for name in ("reads", "samples", "capacity"))
    import_extra("matplotlib")
    check_writable(reads, samples, capacities)
    model, data = open_or_train(Path(options.checkpoint), folder)
    print(f"Images: {data.source}; {data.split}")
    episode = draw_episodes(data.test, 1, model.memory.memory_size, seed=0)
    corruptions = {name: CORRUPTIONS[name] for name in SHOWN}
    pictures.draw_reads(model, episode, corruptions, reads)
    pictures.draw_samples(model, episode, NUM_ITERS, samples)
    rows = capacity(model, data.train, data.test, NUM_ITERS)
    capacity_table(data.source, model.memory.memory_size, rows).show()
    pictures.draw_capacity(rows, capacities)
    print(f"Pictures: demo_reads.png, demo_samples.png and demo_capacity.png in {folder}")
    return 0


def open_or_train(path: Path, folder: Path) -> tuple[DynamicKanervaMachine, Patterns]:
    """The model of the checkpoint and its images; without one, a model trained for a few minutes and kept."""
    if os.path.exists(path):
        model, settings, images = load_model(path)
        data = load_patterns(settings.data)
        if fingerprint(data) != images:
            raise UserError(f"{path} was trained on other images than are at {settings.data} now")
        print(f"Model: {path}")
        return model, data
    quick = folder / "demo.safetensors"
    print(f"There is no checkpoint at {path}: training on MNIST for a few minutes first, {QUICK.steps:,} steps")
    print(f"That is kept in {quick}; for a better model: python -m examples.dkm.train")
    check_writable(quick)
    data = load_patterns(QUICK.data)
    trainer = Trainer(QUICK, data)
    if quick.exists():
        trainer.load(quick)
    train(trainer, quick, every=30)
    return trainer.model.eval(), data


def main(arguments: list[str] | None = None) -> int:
    return exit_status(PROGRAM, run, parser().parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
