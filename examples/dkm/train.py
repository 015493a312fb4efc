"""``python -m fastkm train``: the generative model on real images."""

import argparse
import time
from pathlib import Path

import torch

from examples.dkm.patterns import load_patterns
from examples.dkm.training import Settings, Trainer, read_checkpoint
from fastkm.cli.console import CommandError, progress
from fastkm.models import EpisodeLoss

AVERAGED = 50  # steps behind the numbers on the bar


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    path = Path(options.checkpoint) if options.checkpoint else checkpoint_of(options.data or "mnist", Path("results"))
    given = {name: value for name in Settings._fields if (value := getattr(options, name, None)) is not None}
    if options.resume:
        if not path.exists():
            raise CommandError(f"there is no checkpoint at {path} to resume from")
        settings = read_checkpoint(path)[1]._replace(**given)  # a setting that differs is refused below
    elif path.exists():
        raise CommandError(f"{path} exists; go on with it with --resume, or name another --checkpoint")
    else:
        settings = Settings(**given)
    data = load_patterns(settings.data)
    print(f"Images: {data.source}; {data.split}")
    trainer = Trainer(settings, data)
    if options.resume:
        trainer.load(path)
        print(f"{path}: {trainer.step:,} of {settings.steps:,} steps are done")
    train(trainer, path, options.checkpoint_every)
    print(f"After {trainer.step:,} steps: {describe(trainer)}\nCheckpoint: {path}")
    return 0


def checkpoint_of(data: str, folder: Path) -> Path:
    return folder / f"{Path(data).stem}.safetensors"


def train(trainer: Trainer, path: Path, every: float) -> None:
    """Take the steps that are left and keep a checkpoint, renewed every so many seconds and at the end."""
    saved = time.monotonic()
    with progress("train", trainer.settings.steps, done=trainer.step, seconds=15) as report:
        for _ in trainer.run():
            report(describe(trainer))
            if time.monotonic() - saved >= every:
                trainer.save(path)
                saved = time.monotonic()
    trainer.save(path)


def describe(trainer: Trainer) -> str:
    """The parts of the loss, averaged over the last steps."""
    recent = torch.tensor(trainer.history[-AVERAGED:]).mean(0).tolist()
    parts = ", ".join(
        f"{name.replace('_', ' ')} {value:.1f}" for name, value in zip(EpisodeLoss._fields, recent, strict=True)
    )
    return f"{parts} nats a pattern"
