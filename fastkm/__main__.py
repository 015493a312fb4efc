"""``python -m fastkm doctor | capabilities | check | bench | roofline``."""

import argparse
import sys
from importlib import import_module

from fastkm.cli.console import add_data, add_threads, exit_status, whole_number
from fastkm.testing.presets import PRESETS

MOVED = ("train", "demo", "study")  # they are an example now, see examples/dkm


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m fastkm", description="The memory of the Dynamic Kanerva Machine.")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="what was built, which backends run here, why the others do not")
    commands.add_parser("capabilities", help="what every backend can do, as a Markdown table")
    check = commands.add_parser("check", help="every operation, backend, dtype and preset against float64")
    bench = commands.add_parser("bench", help="real images in and out of the memory, verified and then timed")

    for command, batch, queries in ((check, 2, 12), (bench, None, 32)):
        add_data(command)
        command.add_argument("--presets", nargs="+", choices=PRESETS, metavar="NAME",
                             help=f"of {', '.join(PRESETS)} (default: all)")  # fmt: skip
        command.add_argument("--batch", type=whole_number(1), default=batch,
                             help=f"memories (default: {batch or '16, at the largest presets 4'})")  # fmt: skip
        command.add_argument(
            "--queries", type=whole_number(1), default=queries, help="reads a memory (default: %(default)s)"
        )
        command.add_argument(
            "--iters", type=whole_number(1), default=10, help="iterations of a read (default: %(default)s)"
        )
        add_threads(command)
    bench.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="(default: %(default)s)")
    bench.add_argument("--output", default="results", metavar="FOLDER", help="(default: %(default)s)")
    bench.add_argument("--quick", action="store_true", help="fewer rounds of timing")

    roofline = commands.add_parser("roofline", help="the time that no GPU kernel can beat, operation by operation")
    roofline.add_argument("--batch", type=whole_number(1), default=64, help="memories (default: %(default)s)")
    roofline.add_argument("--queries", type=whole_number(1), default=32, help="reads a memory (default: %(default)s)")
    return main


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and (command := arguments[0]) in MOVED:
        where = f"`python -m examples.dkm.{command}` or `make {command}`, in a checkout of fastkm"
        print(f"python -m fastkm {command}: this command is now an example; run {where}", file=sys.stderr)
        return 2
    options = parser().parse_args(arguments)
    module = import_module(f"fastkm.cli.{'doctor' if options.command == 'capabilities' else options.command}")
    run = module.print_capabilities if options.command == "capabilities" else module.run
    return exit_status(f"python -m fastkm {options.command}", run, options)


if __name__ == "__main__":
    raise SystemExit(main())
