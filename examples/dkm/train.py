"""``python -m examples.dkm.train``: the generative model on real images."""

import argparse
import os
import time
from pathlib import Path

import torch

from examples.dkm.patterns import load_patterns
from examples.dkm.training import Settings, Trainer, read_checkpoint
from fastkm._runtime import dispatch
from fastkm.cli.console import (
    DATA_HELP,
    add_threads,
    check_writable,
    exit_status,
    positive_number,
    progress,
    whole_number,
)
from fastkm.models import EpisodeLoss
from fastkm.testing.extras import UserError, import_extra
from fastkm.testing.images import MNIST

PROGRAM = "python -m examples.dkm.train"
MOST_SEED = 2**63 - 1
AVERAGED = 50  # steps behind the numbers on the bar


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog=PROGRAM, description="Train the generative model on real images; can be killed and resumed."
    )
    command.add_argument("--data", metavar="PATH", help=DATA_HELP)
    command.add_argument("--steps", type=whole_number(1), help="(default: 1600)")
    command.add_argument("--batch", type=whole_number(1), help="episodes a step (default: 16)")
    command.add_argument("--patterns", type=whole_number(1), help="patterns an episode, T (default: 32)")
    command.add_argument("--rows", type=whole_number(1), help="rows of the memory, K (default: 32)")
    command.add_argument("--code-size", type=whole_number(1), help="C (default: 100)")
    command.add_argument("--width", type=whole_number(1), help="channels of the first convolution (default: 24)")
    command.add_argument("--learning-rate", type=positive_number, help="of Adam (default: 4e-3)")
    command.add_argument("--reads", type=whole_number(1), help="of a pattern that was written once (default: 10)")
    command.add_argument(
        "--unrolled", type=whole_number(1), help="turns of the attractor loop with gradient (default: 0)"
    )
    command.add_argument("--noise", type=positive_number, help="of an observed code, σ (default: 1)")
    command.add_argument("--seed", type=whole_number(0, MOST_SEED), help="(default: 0)")
    command.add_argument(
        "--backend", choices=dispatch.PREFERENCE, help="who computes the memory (default: the first that can)"
    )
    command.add_argument("--checkpoint", metavar="FILE", help="(default: results/<data>.safetensors)")
    command.add_argument("--checkpoint-every", type=whole_number(0), default=60, metavar="SECONDS",
                         help="(default: 60)")  # fmt: skip
    command.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    add_threads(command)
    return command


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    path = Path(options.checkpoint) if options.checkpoint else checkpoint_of(options.data or MNIST, Path("results"))
    import_extra("safetensors.torch")  # what the checkpoint is written with
    given = {name: value for name in Settings._fields if (value := getattr(options, name, None)) is not None}
    if options.resume:
        if not os.path.exists(path):
            raise UserError(f"there is no checkpoint at {path} to resume from")
        settings = read_checkpoint(path)[1]._replace(**given)  # a setting that differs is refused below
    elif os.path.exists(path):
        raise UserError(f"{path} exists; go on with it with --resume, or name another --checkpoint")
    else:
        settings = Settings(**given)
    data = load_patterns(settings.data)
    print(f"Images: {data.source}; {data.split}")
    check_writable(path)
    trainer = Trainer(settings, data)
    if options.resume:
        trainer.load(path)
        print(f"{path}: {trainer.step:,} of {settings.steps:,} steps are done")
    train(trainer, path, options.checkpoint_every)
    print(f"After {trainer.step:,} steps: {describe(trainer)}\nCheckpoint: {path}")
    return 0


def checkpoint_of(data: str, folder: Path) -> Path:
    """Named after the whole name of the folder or zip; that of ``.`` is the current folder's."""
    name = data if data == MNIST else Path(data).resolve().name
    return folder / f"{name or 'images'}.safetensors"


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


def main(arguments: list[str] | None = None) -> int:
    return exit_status(PROGRAM, run, parser().parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
