"""``python -m examples.dkm.study``: every figure about the generative model, trainings included, in one run."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.dkm import pictures
from examples.dkm.evaluation import capacity, draw_episodes, read_corrupted, refusals, rises
from examples.dkm.patterns import CORRUPTIONS, Patterns, load_patterns
from examples.dkm.train import checkpoint_of, train
from examples.dkm.training import Settings, Trainer, build_model, fingerprint, load_model
from fastkm import KanervaMemory, MemoryState, kl_memory, solve_addressing, update_posterior
from fastkm._files import write_text
from fastkm.cli.console import (
    add_threads,
    check_writable,
    exit_status,
    markdown_table,
    progress,
    show_table,
    whole_number,
)
from fastkm.cli.machine import machine
from fastkm.models import DynamicKanervaMachine
from fastkm.testing.extras import UserError, import_extra
from fastkm.testing.timing import time_in_turn
from fastkm.writing import WriteResult

PROGRAM = "python -m examples.dkm.study"
EPISODES = 32  # held-out episodes behind a figure
NUM_ITERS, ALONG = 8, 15  # iterations of a read, and those that the energy is followed along
SAMPLES = 4  # of each w, behind the bound
PUBLISHED = {"Dynamic Kanerva Machine (2018)": 77.2, "Kanerva Machine (2018)": 68.3}


class Table(NamedTuple):
    title: str
    headers: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""

    def show(self) -> None:
        show_table(self.title, self.headers, self.rows)
        if self.note:
            print(self.note)

    def markdown(self) -> str:
        return f"### {self.title}\n\n{markdown_table(self.headers, self.rows)}\n\n{self.note}".strip()


class Trained(NamedTuple):
    path: Path
    model: DynamicKanervaMachine
    settings: Settings
    data: Patterns

    @property
    def name(self) -> str:
        return self.path.stem


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog=PROGRAM, description="Every figure about the generative model, trainings included."
    )
    command.add_argument("--data", nargs="+", default=["mnist"], metavar="PATH",
                         help="one model each: mnist, or a folder or zip of PNGs (default: mnist)")  # fmt: skip
    command.add_argument("--steps", type=whole_number(1), default=1600, help="of each training (default: %(default)s)")
    command.add_argument(
        "--ablation-steps", type=whole_number(1), default=300, help="of each short training (default: %(default)s)"
    )
    command.add_argument(
        "--seconds", type=whole_number(1), default=30, help="spent on timing a step (default: %(default)s)"
    )
    command.add_argument("--checkpoint", metavar="FILE", help="print the figures of this model alone, without training")
    command.add_argument("--output", default="results/study", metavar="FOLDER", help="(default: %(default)s)")
    add_threads(command)
    return command


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    if options.checkpoint:
        return show_checkpoint(Path(options.checkpoint))
    output = Path(options.output)
    checkpoints = checkpoints_of(options.data, output)
    report_path, page = output / "study.json", output / "study.md"
    import_extra("safetensors.torch"), import_extra("matplotlib")  # what results are written with
    check_writable(report_path, page, *checkpoints, *map(picture_of, checkpoints))
    trained = [
        train_or_open(Settings(data=data, steps=options.steps), path)
        for data, path in zip(options.data, checkpoints, strict=True)
    ]
    tables: list[Table] = []
    with progress("study", 5 + len(trained)) as start:
        start("reads of corrupted cues")
        tables += clean_up(trained)
        start("energy along reads")
        tables.append(energy(trained))
        start("conditional bound")
        tables.append(bound(trained))
        for one in trained:
            start(f"capacity on {one.name}")
            rows = capacity(one.model, one.data.train, one.data.test, NUM_ITERS)
            tables.append(capacity_table(one.name, one.settings.rows, rows))
            pictures.draw_capacity(rows, picture_of(one.path))
        start("time of a training step")
        tables.append(step_time(trained[0], options.seconds))
        start("ablations, the longest part")
        tables.append(ablations(trained[-1], options.ablation_steps))
    for table in tables:
        table.show()
    about = {name: str(value) for name, value in machine().items()}
    report = {
        "machine": about,
        "settings": [one.settings._asdict() for one in trained],
        "tables": [table._asdict() for table in tables],
    }
    write_text(report_path, json.dumps(report, indent=1) + "\n")
    write_text(page, "\n\n".join(table.markdown() for table in tables) + "\n")
    print(f"Wrote {output}/study.json, study.md and {', '.join(picture_of(path).name for path in checkpoints)}")
    return 0


def show_checkpoint(path: Path) -> int:
    """What is known of one model without training another."""
    trained = [open_checkpoint(path)]
    for table in (*clean_up(trained), energy(trained), bound(trained)):
        table.show()
    return 0


def checkpoints_of(data: list[str], folder: Path) -> list[Path]:
    """Where each model is kept. Two of one name are refused, because a table could not tell them apart either."""
    paths = [checkpoint_of(name, folder) for name in data]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"--data names two folders or zips called {path.stem}; rename one, or study each alone")
    return paths


def picture_of(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"capacity-{checkpoint.stem}.png")


def train_or_open(settings: Settings, path: Path) -> Trained:
    """The model trained on these images; what is left of its training is done first."""
    data = load_patterns(settings.data)
    trainer = Trainer(settings, data)
    print(f"{data.source}; {data.split}")
    if path.exists():
        trainer.load(path)
    train(trainer, path, every=60)
    print(f"{path}: {settings.steps:,} steps in {trainer.seconds / 60:.1f} minutes")
    return Trained(path, trainer.model.eval(), settings, data)


def open_checkpoint(path: Path) -> Trained:
    """A model that is trained, with the images that it was trained on.

    Raises:
        UserError: ``path`` is no checkpoint, or the images are others now.
    """
    model, settings, images = load_model(path)
    data = load_patterns(settings.data)
    if fingerprint(data) != images:
        raise UserError(f"{path} was trained on other images than are at {settings.data} now")
    print(f"Model: {path}\nImages: {data.source}; {data.split}")
    return Trained(path, model, settings, data)


def held_out(one: Trained) -> Tensor:
    return draw_episodes(one.data.test, EPISODES, one.settings.patterns, seed=0)


def mean_and_error(values: Tensor) -> str:
    """Mean and its standard error over episodes; ``values [B, ...]``."""
    means = values.flatten(1).mean(1) if values.dim() > 1 else values
    return f"{means.mean():.4f} ± {means.std() / math.sqrt(len(means)):.4f}"


def clean_up(trained: list[Trained]) -> list[Table]:
    """One table by the decoder's mean, one by its most likely image."""
    rows: dict[str, list[tuple[str, ...]]] = {"mean": [], "mode": []}
    for one in trained:
        for name, corrupt in CORRUPTIONS.items():
            reads = read_corrupted(one.model, held_out(one), corrupt, (1, 2, 4, NUM_ITERS))
            errors = {"mean": (reads.autoencoder, reads.after), "mode": (reads.wrong_autoencoder, reads.wrong_after)}
            for by, (alone, after) in errors.items():
                columns = (reads.cue, alone, *after.values(), after[1] - after[NUM_ITERS])
                rows[by].append((one.name, name, *map(mean_and_error, columns), verdict(reads.cue, alone, after)))
    headers = ("images", "cue", "cue itself", "auto-encoder", "read 1", "2", "4", "8", "read 1 − read 8", "verdict")
    s = trained[0].settings
    note = (
        f"{EPISODES} episodes of T = {s.patterns} images, K = {s.rows}, C = {s.code_size}; ± the standard error over "
        "episodes. It holds where read 8 is at most one standard error of their difference worse than read 1 and, from "
        "a damaged cue, both are better than the auto-encoder alone."
    )
    titles = {
        "mean": "Mean squared pixel error of held-out images read back from corrupted cues",
        "mode": "Share of wrong pixels, of the most likely image, in the same reads",
    }
    return [Table(titles[by], headers, rows[by], note) for by in titles]


def verdict(cue: Tensor, alone: Tensor, after: dict[int, Tensor]) -> str:
    """What is wrong with a row: read 8 above read 1 by more than the standard error of their difference over episodes,
    or, where the cue is damaged, a read above the auto-encoder."""
    rise = (after[NUM_ITERS] - after[1]).flatten(1).mean(1)
    wrong = {"8 > 1": rise.mean() > rise.std() / math.sqrt(len(rise))}
    if cue.any():
        wrong["1 > auto-encoder"] = after[1].mean() >= alone.mean()
        wrong["8 > auto-encoder"] = after[NUM_ITERS].mean() >= alone.mean()
    return ", ".join(words for words, true in wrong.items() if true) or "holds"


def energy(trained: list[Trained]) -> Table:
    rows, totals = [], torch.zeros(3, dtype=torch.int64)
    for one in trained:
        for name, corrupt in CORRUPTIONS.items():
            read = read_corrupted(one.model, held_out(one), corrupt, (ALONG,)).last
            counts = torch.tensor([rises(read.energy), *refusals(read)])
            totals += counts
            first, last = read.energy[..., 0].mean(), read.energy[..., -1].mean()
            rows.append((one.name, name, f"{first:.1f}", f"{last:.1f}", *shares(counts, read.energy[..., 1:].numel())))
    rows.append(("all", "all", "", "", *shares(totals, len(rows) * read.energy[..., 1:].numel())))
    headers = ("images", "cue", "energy at read 1", f"at read {ALONG}", "steps that do not raise it", "of those tried")
    note = (
        f"{ALONG} iterations, so {ALONG - 1} steps a read. A step that would raise the energy is not taken, and the "
        "read rests from then on: so no step of a read raises it. The last column counts the steps tried, and "
        "how many of them encoder and decoder got right by themselves."
    )
    return Table("Energy along reads, in nats", headers, rows, note)


def shares(counts: Tensor, steps: int) -> tuple[str, ...]:
    up, refused, tried = counts.tolist()
    return tuple(f"{n - bad:,} of {n:,} ({1 - bad / n:.2%})" for bad, n in ((up, steps), (refused, tried)))


def bound(trained: list[Trained]) -> Table:
    rows = []
    for one in trained:
        s = one.settings
        torch.manual_seed(0)
        nats = one.model.conditional_bound(held_out(one), SAMPLES)
        with torch.no_grad():
            kl = one.model.memory.kl(one.model.write(held_out(one)).state) / s.patterns
        protocol = (
            f"{one.data.split}; 28×28, a pixel is on above 0.5; T = {s.patterns}, K = {s.rows}, C = {s.code_size}; "
            f"{EPISODES} episodes, {SAMPLES} samples of w"
        )
        rows.append((one.name, *map(mean_and_error, (nats, nats + kl / 10, nats + kl)), protocol))
    rows += [(name, f"{value}", "", "", "published, Omniglot") for name, value in PUBLISHED.items()]
    note = (
        "What differs from the published figures: in training a pattern is read "
        f"{trained[0].settings.reads} times for one write, and a read pays that part of KL(q(M) ‖ p(M)). The "
        "conditional bound leaves this term out, so writing more into the memory lowers it (the ablations below show "
        "by how much). These models also saw a few thousand images only, in minutes on a CPU; whole classes are held "
        "out; images are binarised by a threshold. The figures are therefore not a ranking."
    )
    return Table(
        "Negative conditional bound on held-out images, nats an image",
        ("model", "conditional bound", "with KL(M) of ten reads", "with KL(M) of one read", "protocol"), rows, note,
    )  # fmt: skip


def capacity_table(name: str, memory_size: int, rows: list[dict[str, float]]) -> Table:
    headers = tuple(rows[0])
    exact = ("stored", "bound", "sharpness")
    cells = [tuple(f"{v:.4g}" if name in exact else f"{v:.4f}" for name, v in row.items()) for row in rows]
    note = (
        f"The memory keeps K = {memory_size} rows whatever it stores; the Hopfield read "
        "(softmax, its sharpness chosen on training images) and the nearest neighbour keep every code."
    )
    return Table(f"Capacity on {name}: error from cues with 15 % salt and pepper, and the bound", headers, cells, note)


# ---- a training step ---------------------------------------------------------------------------------------------


def step_time(one: Trained, seconds: float) -> Table:
    """A whole training step, and what of it is the memory, with each backend in turn."""
    settings = s = one.settings._replace(steps=10**9)
    trainers = {name: Trainer(settings._replace(backend=name), one.data) for name in ("native", "reference")}
    steps: dict[str, Callable[[], object]] = {name: trainer.run().__next__ for name, trainer in trainers.items()}
    steps["reference again"] = steps["reference"]
    with torch.no_grad():
        episode, _ = trainers["native"].episode()
        codes = trainers["native"].model.encode(episode)
    memories = {f"memory, {name}": memory_step(trainer.model.memory, codes) for name, trainer in trainers.items()}
    timings = time_in_turn({**steps, **memories}, seconds)
    ms = {name: 1e3 * timing.median for name, timing in timings.items()}
    rows = [
        (name, f"{ms[name]:.1f}", f"{ms[f'memory, {name}']:.2f}", f"{ms[f'memory, {name}'] / ms[name]:.1%}")
        for name in trainers
    ]
    whole, memory = (ms[f"{part}reference"] / ms[f"{part}native"] for part in ("", "memory, "))
    rows.append(("reference / native", f"{whole:.2f}×", f"{memory:.1f}×", ""))
    note = (
        f"Medians, taken in turn in one run with {torch.get_num_threads()} threads; the same reference step timed "
        f"twice differs by {abs(ms['reference again'] / ms['reference'] - 1):.1%}. The memory's part: write, address, "
        "decode, both KLs, and the backward of them, on codes of the same shape. The step is one from the beginning "
        "of a training, with clean cues; later ones also make corrupted cues and read some of them."
    )
    return Table(
        f"A training step at B = {s.batch}, T = {s.patterns}, K = {s.rows}, C = {s.code_size}",
        ("backend", "whole step (ms)", "memory (ms)", "share"), rows, note,
    )  # fmt: skip


def memory_step(memory: KanervaMemory, codes: Tensor) -> Callable[[], object]:
    """Forward and backward of what a training step asks of the memory."""

    def step() -> None:
        leaf = codes.clone().requires_grad_()
        state = memory.write(leaf).state
        weights = solve_addressing(state.mean, leaf, memory.ridge, backend=memory.backend)
        sampled = weights + memory.log_weight_stddev.exp() * torch.randn_like(weights)
        read = sampled @ state.mean
        (read.square().sum() + memory.kl_weights(weights).sum() + memory.kl(state).sum()).backward()

    return step


# ---- ablations ---------------------------------------------------------------------------------------------------


class SolvedOnce(KanervaMemory):
    """Every weight solved against the prior, then one update with all of them."""

    def write(self, values: Tensor, state: MemoryState | None = None, mask: Tensor | None = None) -> WriteResult:
        prior = self.prior_state(values.shape[0]) if state is None else state
        weights = solve_addressing(prior.mean, values, self.ridge, backend=self.backend)
        update = update_posterior(prior, weights, values, self.noise_var, mask=mask, backend=self.backend)
        return WriteResult(update.state, weights, update.innovation_var, update.kl)


class DiagonalKL(KanervaMemory):
    """The released code's KL(q(M) ‖ p(M)): diagonals only, without the ½."""

    def kl(self, state: MemoryState) -> Tensor:
        return kl_memory(state, self.prior_state(state.mean.shape[0]), method="deepmind")


def ablations(one: Trained, steps: int) -> Table:
    """Short trainings that differ in one thing each."""
    settings = one.settings._replace(steps=steps)
    variants: dict[str, tuple[Settings, dict[str, Any]]] = {
        "as built: sequential write, exact KL(M), 1 solve": (settings, {}),
        "weights solved once, against the prior": (settings, {"memory": SolvedOnce}),
        "diagonal KL(M) of the released code": (settings, {"memory": DiagonalKL}),
        "num_opt_iters = 3": (settings, {"num_opt_iters": 3}),
        "three turns of the dynamics in training": (settings._replace(unrolled=3), {}),
        "clean cues in training, as in the paper": (settings._replace(corrupt=False), {}),
        "KL(M) paid by one read of each pattern, as in the paper": (settings._replace(reads=1), {}),
    }
    rows = []
    for name, (changed, options) in variants.items():
        trainer = Trainer(changed, one.data, build_model(changed, **options))
        for _ in trainer.run():
            pass
        model = trainer.model.eval()
        reads = read_corrupted(model, held_out(one), CORRUPTIONS["salt and pepper 15 %"], (1, NUM_ITERS, ALONG))
        refused, tried = refusals(reads.last)
        torch.manual_seed(0)
        nats = model.conditional_bound(held_out(one), SAMPLES)
        exact_kl = kl_memory(model.write(held_out(one)).state, model.memory.prior_state(EPISODES))
        per_image = exact_kl / settings.patterns
        cells = (reads.after[1], reads.after[NUM_ITERS], nats, per_image, nats + per_image)
        rows.append((name, *map(mean_and_error, cells), f"{1 - refused / tried:.2%}"))
    headers = (
        "variant",
        "error, read 1",
        "read 8",
        "bound (nats)",
        "exact KL(M) / T",
        "sum",
        "steps that do not raise the energy",
    )
    return Table(f"Ablations on {one.name}: {steps:,} steps each, cues with 15 % salt and pepper", headers, rows)


def main(arguments: list[str] | None = None) -> int:
    return exit_status(PROGRAM, run, parser().parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
