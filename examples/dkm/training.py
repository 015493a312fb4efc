"""Training the generative model: settings, steps, and a checkpoint that is whole or not there."""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

import fastkm
from examples.dkm.patterns import Patterns, binary, corrupt, jitter
from fastkm import KanervaMemory
from fastkm._files import replace_file
from fastkm.models import ConvDecoder, ConvEncoder, DynamicKanervaMachine, EpisodeLoss
from fastkm.testing.episodes import draw_images
from fastkm.testing.extras import UserError, import_extra

RAMP = (0.05, 0.3)  # of the training, over which corrupted cues come in
MOST_ITERS = 8  # of the attractor loop, behind a cue
# Of the training, after which batch normalisation holds its averages if turns are unrolled. The patterns of each turn
# are a batch with averages of its own; a read has one set for all of them, and training now meets that one.
HELD = 0.6
GRADIENT_NORM = 100.0  # nats a pattern; a longer gradient is shortened to it


class Settings(NamedTuple):
    """Everything that decides what a training computes."""

    data: str = "mnist"
    steps: int = 1600
    batch: int = 16  # episodes a step
    patterns: int = 32  # T
    rows: int = 32  # K
    code_size: int = 100  # C
    width: int = 24  # channels of the first convolution
    learning_rate: float = 4e-3  # falls to zero along half a cosine
    reads: int = 10  # of a pattern that was written once
    unrolled: int = 0  # turns of the attractor loop that a gradient passes
    noise: float = 1.0  # σ; unbounded codes can grow instead, only slower
    corrupt: bool = True  # cues are corrupted, see `Trainer.cues`
    seed: int = 0
    backend: str | None = None


def build_model(settings: Settings, memory: type[KanervaMemory] = KanervaMemory, **options) -> DynamicKanervaMachine:
    torch.manual_seed(settings.seed)
    return DynamicKanervaMachine(
        ConvEncoder(settings.code_size, settings.width),
        ConvDecoder(settings.code_size, settings.width),
        memory(settings.code_size, settings.rows, obs_noise_stddev=settings.noise, backend=settings.backend, **options),
    )


class Trainer:
    """Steps that depend on the settings and the number of the step alone, so a resumed training is the same one."""

    def __init__(self, settings: Settings, data: Patterns, model: DynamicKanervaMachine | None = None) -> None:
        self.settings, self.data = settings, data
        self.model = build_model(settings) if model is None else model
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.learning_rate)
        self.history: list[list[float]] = []  # the parts of the loss of every step
        self.seconds = 0.0  # spent on them

    @property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    @property
    def step(self) -> int:
        return len(self.history)

    @property
    def learning_rate(self) -> float:
        s = self.settings
        return s.learning_rate * (1 + math.cos(math.pi * self.step / s.steps)) / 2

    def episode(self) -> tuple[Tensor, Tensor | None]:
        """The patterns of the next step [B, T, 1, 28, 28] and the cues; later random numbers are those of this step."""
        s = self.settings
        generator = torch.Generator().manual_seed((1_000_003 * s.seed + self.step) % 2**64)
        images = draw_images(self.data.train, s.batch, s.patterns, generator)
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        patterns = binary(jitter(images.flatten(0, 1), generator)).view_as(images)
        return patterns, self.cues(patterns, generator) if self.settings.corrupt else None

    def cues(self, patterns: Tensor, generator: torch.Generator) -> Tensor | None:
        """What the weights are inferred from: a third each of clean patterns, corrupted ones, and reads of those.

        The last are what the model itself makes of corrupted cues in a few iterations, as the attractor loop will meet
        them; no gradient goes through them. All cues are clean at first.
        """
        begin, end = RAMP
        progress = min(1.0, max(0.0, (self.step / self.settings.steps - begin) / (end - begin)))
        each = round(progress * patterns.shape[1] / 3)
        if each == 0:
            return None
        order = torch.randperm(patterns.shape[1], generator=generator)
        num_iters = int(torch.randint(1, MOST_ITERS + 1, (), generator=generator))
        corrupted = corrupt(patterns[:, order[: 2 * each]], generator)
        self.model.eval()
        with torch.no_grad():
            state = self.model.write(patterns).state
        read = self.model.attractor_read(corrupted[:, :each], num_iters, state=state).patterns
        return patterns.index_copy(1, order[: 2 * each], torch.cat([binary(read), corrupted[:, each:]], 1))

    def run(self) -> Iterator[EpisodeLoss]:
        """The steps that are left; yields the loss of each."""
        while self.step < self.settings.steps:
            begin = time.perf_counter()
            episode, cues = self.episode()
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate
            self.optimizer.zero_grad(set_to_none=True)
            self.model.train(self.settings.unrolled == 0 or self.step < HELD * self.settings.steps)
            loss = self.loss(episode, cues)
            loss.total.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
            self.optimizer.step()
            self.history.append([part.item() for part in loss])
            self.seconds += time.perf_counter() - begin
            yield loss

    def loss(self, episode: Tensor, cues: Tensor | None) -> EpisodeLoss:
        """The loss of the next step; a training that has diverged ends here, and keeps its last checkpoint."""
        try:
            loss = self.model.loss(episode, cues=cues, num_reads=self.settings.reads, unrolled=self.settings.unrolled)
            why = None if loss.total.isfinite() else "the loss is no finite number"
        except torch.linalg.LinAlgError as error:
            why = str(error)
        if why is not None:
            raise UserError(f"the training has diverged at step {self.step + 1:,}: {why}; take a lower learning rate")
        return loss

    def save(self, path: Path) -> None:
        """Write everything needed to go on; ``path`` holds the old checkpoint or the new one, never a part of one."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, tensor in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = tensor
        tensors["history"] = torch.tensor(self.history, dtype=torch.float64).reshape(-1, len(EpisodeLoss._fields))
        tensors["seconds"] = torch.tensor(self.seconds, dtype=torch.float64)
        metadata = {
            "settings": json.dumps(self.settings._asdict()),
            "data": fingerprint(self.data),
            "fastkm": fastkm.__version__,
        }
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as partial:
            import_extra("safetensors.torch").save_file(tensors, partial, metadata)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of the same settings and data."""
        tensors, settings, data = read_checkpoint(path)
        for name, ours in self.settings._asdict().items():
            if name != "data" and ours != getattr(settings, name):  # images are told by what they are, not by where
                raise UserError(f"{path} was trained with {name} = {getattr(settings, name)}, not {ours}")
        if data != fingerprint(self.data):
            raise UserError(f"{path} was trained on other images than {self.data.source}")
        moments = ("step", "exp_avg", "exp_avg_sq")
        for name in ("history", "seconds", *(f"optimizer.{key}.{x}" for x in self.parameters for key in moments)):
            if name not in tensors:
                raise UserError(f"{path} holds no {name}, so that its training cannot go on")
        load_weights(self.model, tensors, path)
        history = tensors["history"]  # of an older checkpoint without the later parts of the loss
        self.history = pad(history, (0, len(EpisodeLoss._fields) - history.shape[1])).tolist()
        self.seconds = tensors["seconds"].item()
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = {key: tensors[f"optimizer.{key}.{name}"] for key in moments}


def load_model(path: Path) -> tuple[DynamicKanervaMachine, Settings, str]:
    """The model of a checkpoint, its settings, and the fingerprint of the images it was trained on."""
    tensors, settings, data = read_checkpoint(path)
    model = build_model(settings)
    load_weights(model, tensors, path)
    return model.eval(), settings, data


def load_weights(model: DynamicKanervaMachine, tensors: dict[str, Tensor], path: Path) -> None:
    """Load all of them, or refuse and leave the model as it is: torch would load those that fit before it refuses."""
    ours, theirs = model.state_dict(), part(tensors, "model.")
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            wrong = "is missing"
        elif name not in ours:
            wrong = "is not in it"
        elif ours[name].shape != theirs[name].shape:
            wrong = f"has shape {list(theirs[name].shape)}, not {list(ours[name].shape)}"
        else:
            continue
        raise UserError(f"{path} holds a model of another version of fastkm: model.{name} {wrong}")
    model.load_state_dict(theirs)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], Settings, str]:
    safetensors = import_extra("safetensors")
    try:
        content = path.read_bytes()  # once, for another training may replace the file meanwhile
        tensors = import_extra("safetensors.torch").load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header["__metadata__"]
        return tensors, Settings(**json.loads(metadata["settings"])), metadata["data"]
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no checkpoint of `python -m examples.dkm.train` ({error})") from error


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def fingerprint(data: Patterns) -> str:
    """Of the training images and the held-out ones."""
    digest = hashlib.sha256(data.train.numpy().tobytes())
    digest.update(data.test.numpy().tobytes())
    return digest.hexdigest()
