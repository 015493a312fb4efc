"""``python -m fastkm demo``: held-out images stored, corrupted and cleaned up, in three pictures."""

import argparse
from pathlib import Path

import torch

from fastkm.cli import model_pictures
from fastkm.cli.console import CommandError
from fastkm.cli.evaluation import LENGTHS, capacity, draw_episodes
from fastkm.cli.patterns import CORRUPTIONS, Patterns, load_patterns
from fastkm.cli.study import capacity_table
from fastkm.cli.train import train
from fastkm.cli.training import Settings, Trainer, fingerprint, load_model
from fastkm.models import DynamicKanervaMachine

SHOWN = ("salt and pepper 15 %", "a quarter occluded", "Gaussian 0.3")
QUICK = Settings(steps=600)  # a few minutes
NUM_ITERS = 8


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    folder = Path(options.output)
    model, data = open_or_train(Path(options.checkpoint), folder)
    print(f"Images: {data.source}; {data.split}")
    settings_t = model.memory.memory_size
    pictures = {
        "demo_reads.png": lambda path: model_pictures.draw_reads(
            model, draw_episodes(data.test, 1, settings_t, seed=0), {name: CORRUPTIONS[name] for name in SHOWN}, path
        ),
        "demo_samples.png": lambda path: model_pictures.draw_samples(
            model, draw_episodes(data.test, 1, settings_t, seed=0), NUM_ITERS, path
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures.items():
        draw(folder / name)
        print(f"Picture: {folder / name}")
    lengths = tuple(length for length in LENGTHS if length <= len(data.test))
    rows = capacity(model, data.train, data.test, lengths, NUM_ITERS)
    capacity_table(data.source, model.memory.memory_size, rows).show()
    model_pictures.draw_capacity(rows, folder / "demo_capacity.png")
    print(f"Picture: {folder / 'demo_capacity.png'}")
    return 0


def open_or_train(path: Path, folder: Path) -> tuple[DynamicKanervaMachine, Patterns]:
    """The model of the checkpoint and its images; without one, a model trained for a few minutes and kept."""
    if path.exists():
        model, settings, images = load_model(path)
        data = load_patterns(settings.data)
        if fingerprint(data) != images:
            raise CommandError(f"{path} was trained on other images than are at {settings.data} now")
        print(f"Model: {path}")
        return model, data
    quick = folder / "demo.safetensors"
    print(f"There is no checkpoint at {path}: training on MNIST for a few minutes first, {QUICK.steps:,} steps")
    print(f"That is kept in {quick}; for a better model: python -m fastkm train")
    data = load_patterns(QUICK.data)
    trainer = Trainer(QUICK, data)
    if quick.exists():
        trainer.load(quick)
    train(trainer, quick, every=30)
    return trainer.model.eval(), data
