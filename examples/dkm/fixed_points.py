"""``python -m examples.dkm.fixed_points``: where the reads of a trained model rest, and why there.

Without its codec a read of the memory is linear, ``ẑ = A z`` with ``A = Rᵀ (R Rᵀ + λI)⁻¹ R [C, C]``, and returns the
part of z along the rows of R, shrunk. A turn of the attractor dynamics is ``f(z) = A e(d(z))``. A stored pattern x with
code ``z = e(x)`` is read first as ``A z``, and three errors move it. Π projects onto the rows of R:

* interference, ``z − Πz``: no read returns what is outside of the rows;
* shrinkage, ``Πz − A z``: the ridge λ;
* the codec, ``A (e(d(z)) − z)``: encoder and decoder are not the identity on a code.

How far reads go from there is how the loop answers. J is the Jacobian of f at ``A z``: where its spectral radius is
near 1, an error of every turn adds up before reads rest. The same turns without the memory, ``A = I``, show what the
codec does alone.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from examples.dkm.evaluation import draw_episodes
from examples.dkm.patterns import binary, load_patterns
from examples.dkm.training import load_model
from fastkm import MemoryState, solve_addressing
from fastkm.cli.console import add_threads, exit_status, show_table, whole_number
from fastkm.models import DynamicKanervaMachine

PROGRAM = "python -m examples.dkm.fixed_points"
LENGTHS = (8, 16, 24, 32, 48)  # patterns stored
READS = 100  # after which a read is taken to rest
SHOWN = (1, 2, 8, READS)


class LinearRead(NamedTuple):
    """What a memory does to codes."""

    basis: Tensor  # [C, K], orthonormal, of the rows of R
    read: Tensor  # A [C, C]

    @classmethod
    def of(cls, model: DynamicKanervaMachine, state: MemoryState) -> "LinearRead":
        """Of a state of one memory, ``mean [1, K, C]``."""
        units = torch.eye(state.mean.shape[2], dtype=state.mean.dtype)
        weights = solve_addressing(state.mean, units[None], model.memory.ridge)[0]  # [C, K]
        return cls(torch.linalg.qr(state.mean[0].mT).Q, weights @ state.mean[0])


def turn(model: DynamicKanervaMachine, memory: LinearRead, inside: Tensor) -> Tensor:
    """f of codes ``inside @ basisᵀ``, as coordinates ``[N, K]`` in the basis, like ``inside``.

    The decoder's mean stands for its mode, which has no derivative.
    """
    return model.encoder(model.decoder(inside @ memory.basis.mT).mean) @ memory.read @ memory.basis


def jacobians(model: DynamicKanervaMachine, memory: LinearRead, inside: Tensor) -> Tensor:
    """J ``[N, K, K]`` at ``inside [N, K]``."""
    return vmap(jacrev(lambda y: turn(model, memory, y[None])[0]))(inside)


@torch.no_grad()
def distances(model: DynamicKanervaMachine, memory: LinearRead, codes: Tensor) -> dict[str, Tensor]:
    """Distances from the stored ``codes [N, C]`` in units of their norm, and what J does there; each [N]."""
    along, read = codes @ memory.basis @ memory.basis.mT, codes @ memory.read
    inside = read @ memory.basis
    jacobian = jacobians(model, memory, inside)
    parts = {
        "interference": codes - along,
        "shrinkage": along - read,
        "codec": (model.encoder(model.decoder(codes).mean) - codes) @ memory.read,
        "read 1": read - codes,
    }
    measured = {name: part.norm(dim=-1) / codes.norm(dim=-1) for name, part in parts.items()}
    measured["spectral radius"] = torch.linalg.eigvals(jacobian).abs().amax(-1)
    measured["largest singular value"] = torch.linalg.matrix_norm(jacobian, 2)
    return measured


@torch.no_grad()
def resting(model: DynamicKanervaMachine, patterns: Tensor, memory: LinearRead, codes: Tensor) -> dict[str, Tensor]:
    """Stored ``patterns [N, ...]`` read again and again: how far they come, and what is wrong with them; each [N].

    The dynamics alone, without the rule that a read does not raise its energy.
    """
    errors, x = {}, patterns
    for n in range(1, READS + 1):
        before, read = x, model.encoder(x) @ memory.read
        x = binary(model.decoder(read).mean)
        if n in SHOWN:
            errors[f"wrong pixels, read {n}"] = (x != patterns).flatten(1).to(read.dtype).mean(1)
    rest = (read - codes).norm(dim=-1) / codes.norm(dim=-1)
    return {f"read {READS}": rest, **errors, "at rest": (x == before).flatten(1).all(1).to(read.dtype)}


def analyse(model: DynamicKanervaMachine, images: Tensor, stored: int, memories: int) -> dict[str, float]:
    """Averages over ``memories`` memories of so many stored images."""
    found: dict[str, list[Tensor]] = {}
    for patterns in draw_episodes(images, memories, stored, seed=3):
        with torch.no_grad():
            written = model.write(patterns[None])
            memory, codes = LinearRead.of(model, written.state), model.encoder(patterns)
        everything = torch.eye(codes.shape[1], dtype=codes.dtype)
        alone = resting(model, patterns, LinearRead(everything, everything), codes)
        measured = {
            **distances(model, memory, codes),
            **resting(model, patterns, memory, codes),
            **{f"without the memory: {name}": values for name, values in alone.items()},
        }
        for name, values in measured.items():
            found.setdefault(name, []).append(values)
    return {"stored": stored, **{name: torch.cat(values).mean().item() for name, values in found.items()}}


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog=PROGRAM, description="Where the reads of a trained model rest, and why.")
    command.add_argument("--checkpoint", default="results/mnist.safetensors", metavar="FILE",
                         help="of examples.dkm.train (default: %(default)s)")  # fmt: skip
    command.add_argument("--memories", type=whole_number(1), default=2,
                         help="behind each row (default: %(default)s)")  # fmt: skip
    add_threads(command)
    return command


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    model, settings, _ = load_model(Path(options.checkpoint))
    data = load_patterns(settings.data)
    print(f"Model: {options.checkpoint}, K = {settings.rows}\nImages: {data.source}; {data.split}")
    rows = [analyse(model, data.test, stored, options.memories) for stored in LENGTHS]
    names = rows[0].keys() - {"stored"}
    cells = [(name, *(f"{row[name]:.4f}" for row in rows)) for name in rows[0] if name in names]
    show_table("Stored patterns read again and again", ("mean over patterns", *(f"T = {n}" for n in LENGTHS)), cells)
    return 0


def main(arguments: list[str] | None = None) -> int:
    return exit_status(PROGRAM, run, parser().parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
