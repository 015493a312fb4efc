"""``python -m examples.dkm.export``: of a checkpoint the model alone, in half precision."""

import argparse
import json
from pathlib import Path

import fastkm
from examples.dkm.training import build_model, load_weights, read_checkpoint
from fastkm._files import replace_file
from fastkm.cli.console import check_writable, exit_status
from fastkm.testing.extras import UserError, import_extra

PROGRAM = "python -m examples.dkm.export"


def export(checkpoint: Path, output: Path) -> int:
    """Write the model in half precision, without what only a training needs; returns the bytes.

    ``load_model`` opens it like any checkpoint and computes in float32. The images are named, not where they lay.

    Raises:
        UserError: ``checkpoint`` is none, or a weight leaves float16.
    """
    tensors, settings, data = read_checkpoint(checkpoint)
    load_weights(build_model(settings), tensors, checkpoint)  # refuses what is no whole model
    halves = {}
    for name, tensor in tensors.items():
        if name.startswith("model."):
            halves[name] = tensor.half() if tensor.is_floating_point() else tensor
            if not halves[name].isfinite().all():
                raise UserError(f"{checkpoint}: {name} leaves float16, its largest entry is {tensor.abs().max():.3g}")
    settings = settings._replace(data=Path(settings.data).name)
    metadata = {"settings": json.dumps(settings._asdict()), "data": data, "fastkm": fastkm.__version__}
    with replace_file(output) as partial:
        import_extra("safetensors.torch").save_file(halves, partial, metadata)
    return output.stat().st_size


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog=PROGRAM, description="Of a checkpoint the model alone, in half precision.")
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="of examples.dkm.train")
    command.add_argument("output", metavar="FILE", help="what to write")
    return command


def run(options: argparse.Namespace) -> int:
    output = Path(options.output)
    check_writable(output)
    print(f"{output}: {export(Path(options.checkpoint), output):,} bytes")
    return 0


def main(arguments: list[str] | None = None) -> int:
    return exit_status(PROGRAM, run, parser().parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
