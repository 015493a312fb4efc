"""Pictures from folders and zips: they are read as they look, the same ones wherever they lie, or refused in words."""

import io
import os
import struct
import threading
import zipfile
import zlib

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image", reason="reading PNGs needs Pillow")
PngImagePlugin = pytest.importorskip("PIL.PngImagePlugin")

from examples.dkm.patterns import load_patterns  # noqa: E402
from fastkm.__main__ import main  # noqa: E402
from fastkm.testing import images  # noqa: E402
from fastkm.testing.extras import UserError  # noqa: E402
from fastkm.testing.images import load_images, read_pngs  # noqa: E402

COUNT = 12
CP437 = 9 * "\u00e9"  # as many bytes in this encoding, which names of a zip may have


def stroke(i: int) -> np.ndarray:
    """A picture of 0 and 255, each another one."""
    pixels = np.zeros((28, 28), np.uint8)
    pixels[i + 2 : i + 5, 4:20] = 255
    pixels[3:25, i + 4] = 255
    return pixels


def save_all(folder, draw, **options):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(COUNT):
        picture = draw(stroke(i))
        picture = picture if isinstance(picture, bytes) else encode(picture, **options)
        (folder / f"{i:02}.png").write_bytes(picture)
    return folder


def encode(picture, **options) -> bytes:
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, "png", **options)
    return buffer.getvalue()


def png(depth: int, kind: int, rows: list[bytes], side: int, transparent: bytes = b"") -> bytes:
    """A PNG that Pillow itself does not write: any bit depth and colour type."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, kind, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    chunks = header, *([chunk(b"tRNS", transparent)] if transparent else []), data, chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def packed(ink: np.ndarray, depth: int, on: int, off: int) -> list[bytes]:
    values = np.where(ink > 0, on, off)
    if depth == 16:
        return [row.astype(">u2").tobytes() for row in values]
    bits = (values[..., None] >> np.arange(depth)[::-1]) & 1
    return [row.tobytes() for row in np.packbits(bits.reshape(len(values), -1).astype(np.uint8), axis=1)]


def with_alpha(mode: str):
    def draw(ink):
        picture = np.zeros((*ink.shape, len(mode)), np.uint8)
        picture[..., -1] = ink
        return picture

    return draw


def palette(ink):
    picture = Image.fromarray((ink > 0).astype(np.uint8)).convert("P")
    picture.putpalette([0] * 6)
    return picture


# ---- read as they look -----------------------------------------------------------------------------------------------

# Black strokes on white, by what makes the ground white.
WHITE_GROUND = {
    "grey": lambda ink: 255 - ink,
    "colour": lambda ink: np.repeat(255 - ink[..., None], 3, -1),
    "one bit": lambda ink: Image.fromarray(255 - ink).convert("1"),
    "transparent grey": with_alpha("LA"),
    "transparent colour": with_alpha("RGBA"),
    "half transparent white": lambda ink: np.stack([255 - ink] * 3 + [ink // 2 + 127], -1),
    "16 bits": lambda ink: png(16, 0, packed(ink, 16, 0, 65535), 28),
    "4 bits": lambda ink: png(4, 0, packed(ink, 4, 0, 15), 28),
    "2 bits": lambda ink: png(2, 0, packed(ink, 2, 0, 3), 28),
    "transparent value of 1 bit": lambda ink: png(1, 0, packed(ink, 1, 0, 1), 28, struct.pack(">H", 1)),
    "faint": lambda ink: 200 - ink // 2,
}


@pytest.mark.parametrize("kind", WHITE_GROUND)
def test_the_same_strokes_are_read_from_every_kind_of_picture(kind, tmp_path):
    _, pixels, _ = read_pngs(save_all(tmp_path, WHITE_GROUND[kind]))
    assert torch.equal(pixels, torch.stack([torch.from_numpy(stroke(i) / 255).flatten() for i in range(COUNT)]))


@pytest.mark.parametrize(("depth", "kind"), [(2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_a_grey_or_colour_that_is_transparent_is_white(depth, kind, tmp_path):
    """The value that is named lies between two others, so that white tells from what it was."""
    top = 2**depth - 1
    clear, bright = top // 3, top // 3 * 2
    channels = 3 if kind == 2 else 1

    def draw(ink):
        values = np.where(ink > 0, 0, clear)
        values[25:] = bright
        values = np.repeat(values[..., None], channels, -1).reshape(28, -1)
        if depth < 8:
            bits = (values[..., None] >> np.arange(depth)[::-1]) & 1
            rows = [row.tobytes() for row in np.packbits(bits.reshape(28, -1).astype(np.uint8), axis=1)]
        else:
            rows = [row.astype(">u2" if depth == 16 else np.uint8).tobytes() for row in values]
        return png(depth, kind, rows, 28, struct.pack(">H", clear) * channels)

    _, pixels, _ = read_pngs(save_all(tmp_path, draw))
    want = torch.stack([torch.from_numpy(stroke(i) / 255) for i in range(COUNT)])
    want[:, 25:] = 1 / 3  # of the way from white to black
    torch.testing.assert_close(pixels.unflatten(1, (28, 28)), want, rtol=0, atol=1 / 255)


@pytest.mark.parametrize("side", [28, 45])
def test_a_palette_and_16_bits_are_read_like_8(side, tmp_path):
    def grey(ink):
        return (np.pad(ink, (0, side - 28)) // 255 * np.arange(5, 5 + side, dtype=np.uint8)).astype(np.uint8)

    _, want, _ = read_pngs(save_all(tmp_path / "eight", grey))
    _, deep, _ = read_pngs(save_all(tmp_path / "deep", lambda ink: grey(ink).astype(np.uint16) * 257))
    assert torch.equal(deep, want)
    _, indexed, _ = read_pngs(save_all(tmp_path / "palette", palette, transparency=0))
    _, opaque, _ = read_pngs(save_all(tmp_path / "opaque", lambda ink: 255 - ink))
    assert torch.equal(indexed, opaque)


def test_pixels_reach_from_0_to_1(tmp_path):
    """Labels 0 and 1 in 8 bits look black to the eye; a picture of 12 bits in 16 is as dark."""
    for draw in (lambda ink: ink // 255, lambda ink: ink.astype(np.uint16) * 16):
        _, pixels, _ = read_pngs(save_all(tmp_path, draw))
        assert pixels.unique().tolist() == [0, 1]


@pytest.mark.parametrize("draw", [np.zeros_like, lambda ink: 255 - 0 * ink, lambda ink: stroke(3)])
def test_pictures_that_are_all_the_same_are_refused_by_all(draw, tmp_path, capsys):
    save_all(tmp_path / "same", draw)
    for load in (load_images, load_patterns):
        with pytest.raises(UserError, match="must hold images that differ"):
            load(str(tmp_path / "same"))
    assert main(["check", "--presets", "S", "--data", str(tmp_path / "same")]) == 2
    assert "must hold images that differ" in capsys.readouterr().err


def test_strokes_too_thin_to_be_on_are_refused_for_training(tmp_path):
    """A line of one pixel in a picture of 600 is grey after the picture was made small, and no pixel is on."""
    save_all(tmp_path, lambda ink: np.kron(ink, np.eye(20, dtype=np.uint8)))
    assert len(load_images(str(tmp_path)).held_out) == COUNT // 5
    with pytest.raises(UserError, match=r"a pixel on where it is above 0\.5"):
        load_patterns(str(tmp_path))


# ---- the same ones wherever they lie ---------------------------------------------------------------------------------


def zip_of(path, entries, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in entries:
            info = zipfile.ZipInfo("x")
            info.filename = name
            archive.writestr(info, data)
    return path


def entries():
    return [(f"{i % 3}/{i:02}.png", encode(stroke(i))) for i in range(COUNT)]


def test_what_programs_leave_beside_pictures_is_not_counted(tmp_path):
    clean = save_all(tmp_path / "clean", Image.fromarray)
    want = read_pngs(clean)
    other = encode(stroke(13))
    for folder in (".ipynb_checkpoints", ".thumbnails/large", "@eaDir", "__MACOSX", "a/.hidden"):
        (clean / folder).mkdir(parents=True)
        (clean / folder / "copy.png").write_bytes(other)
        zip_of(clean / folder / "more.zip", [("x.png", other)])
    (clean / "._00.png").write_bytes(b"what macOS leaves")
    (clean / "x.png").mkdir()
    (clean / "gone.png").symlink_to(clean / "nowhere")
    os.mkfifo(clean / "pipe.png")
    assert read_pngs(clean)[0] == want[0]
    assert torch.equal(read_pngs(clean)[1], want[1])
    hidden = [("__MACOSX/._00.png", b""), (".git/1.png", other), ("a/@eaDir/1.png", other), ("x.png/", b"")]
    archive = zip_of(tmp_path / "a.zip", [*hidden, *((name, (clean / name).read_bytes()) for name in want[0])])
    assert read_pngs(archive)[0] == want[0]
    below = tmp_path / ".cache" / "pictures"  # a hidden folder that was asked for by name
    save_all(below, Image.fromarray)
    assert read_pngs(below)[0] == want[0]


@pytest.mark.parametrize("prefix", ["", "./", "/"])
def test_names_with_backslashes_are_those_with_slashes(prefix, tmp_path):
    want = read_pngs(zip_of(tmp_path / "forward.zip", entries()))
    back = [(prefix + name.replace("/", "\\"), data) for name, data in entries()]
    found = read_pngs(zip_of(tmp_path / "back.zip", back))
    assert [name.removeprefix("/") for name in found[0]] == want[0]
    assert torch.equal(found[1], want[1])


def headers(raw, local, central):
    """Where a field lies in every header, which has one place in local headers and another in central ones."""
    for sign, at in ((b"PK\3\4", local), (b"PK\1\2", central)):
        i = raw.find(sign)
        while i >= 0:
            yield i + at
            i = raw.find(sign, i + 4)


@pytest.mark.parametrize("name", ["z", "\u00e9", "\u4e2d", "\u03bb"])
def test_a_name_in_utf8_sorts_alike_with_and_without_its_flag(name, tmp_path):
    """Some programs write UTF-8 and do not say so. What is unpacked has the same names."""
    pictures = [(f"{(name, 'y', 'zz')[i % 3]}{i}.png", encode(stroke(i))) for i in range(COUNT)]
    want = read_pngs(zip_of(tmp_path / "said.zip", pictures))
    raw = bytearray((tmp_path / "said.zip").read_bytes())
    for at in headers(raw, 6, 8):
        raw[at + 1] &= ~(images.UTF8_NAME >> 8)
    (tmp_path / "unsaid.zip").write_bytes(raw)
    folder = tmp_path / "folder"
    folder.mkdir()
    for file, data in pictures:
        (folder / file).write_bytes(data)
    for path in (tmp_path / "unsaid.zip", folder):
        names, pixels, _ = read_pngs(path)
        assert names == want[0]
        assert torch.equal(pixels, want[1])


def test_a_name_that_is_no_utf8_is_the_same_in_folder_and_zip(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    pictures = [(f"{CP437}{i % 7:02}{i}.png", encode(stroke(i))) for i in range(COUNT)]
    for file, data in pictures:
        with open(os.path.join(os.fsencode(folder), file.encode("cp437")), "wb") as unpacked:
            unpacked.write(data)
    raw = zip_of(tmp_path / "a.zip", [(file.replace(CP437, "#" * 9), data) for file, data in pictures]).read_bytes()
    (tmp_path / "a.zip").write_bytes(raw.replace(b"#" * 9, CP437.encode("cp437")))
    names, pixels, _ = read_pngs(folder)
    found = read_pngs(tmp_path / "a.zip")
    assert found[0] == names
    assert torch.equal(found[1], pixels)


# ---- refused in words ------------------------------------------------------------------------------------------------


def broken_zip(path, kind):
    zip_of(path, entries(), compression=zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    first = raw.find(b"IDAT")
    if kind in ("data", "deflated"):
        raw[first if first > 0 else 60] ^= 0xFF
    elif kind == "header":
        raw[0] = 0
    elif kind == "directory":
        raw[raw.find(b"PK\1\2")] = 0
    elif kind == "cut":
        raw = raw[: len(raw) // 2]
    else:  # a flag or a method that zipfile does not know
        where, value = {"encrypted": ((6, 8), 1), "deflate64": ((8, 10), 9), "unknown": ((8, 10), 77)}[kind]
        for at in headers(raw, *where):
            raw[at] = value
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("inside", [False, True], ids=["a zip", "a zip in a folder"])
@pytest.mark.parametrize(
    "kind", ["data", "deflated", "header", "directory", "cut", "encrypted", "deflate64", "unknown"]
)
def test_a_zip_that_cannot_be_read_is_refused(kind, inside, tmp_path):
    path = broken_zip(tmp_path / "broken.zip", kind)
    with pytest.raises(UserError, match=r"--data.*(broken\.zip|\d\d\.png)"):
        read_pngs(tmp_path if inside else path)


def with_text():
    info = PngImagePlugin.PngInfo()
    info.add_text("k", "x" * 2_000_000, zip=True)
    return encode(stroke(0), pnginfo=info)


BAD_PICTURES = {
    "empty": lambda: b"",
    "text": lambda: b"hello",
    "cut": lambda: encode(stroke(0))[:60],
    "a damaged header": lambda: encode(stroke(0)).replace(b"IHDR", b"IHDX"),
    "a damaged chunk": lambda: encode(stroke(0)).replace(b"IDAT", b"IDAX"),
    "a large text": with_text,
    "too many pixels": lambda: encode(Image.new("1", (9_000, 9_000))),
    "many more": lambda: encode(Image.new("1", (20_000, 10_000))),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_cannot_be_read_is_refused(kind, tmp_path):
    folder = save_all(tmp_path / "folder", Image.fromarray)
    (folder / "00.png").write_bytes(BAD_PICTURES[kind]())
    with pytest.raises(UserError, match=r"--data: 00\.png is not a readable PNG"):
        read_pngs(folder)
    archive = zip_of(tmp_path / "a.zip", [(file.name, file.read_bytes()) for file in folder.iterdir()])
    with pytest.raises(UserError, match=r"--data: 00\.png is not a readable PNG"):
        read_pngs(archive)


def test_a_file_of_gigabytes_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MOST_BYTES", 10_000)
    for path in (tmp_path / "folder", tmp_path / "a.zip"):
        if path.suffix:
            zip_of(path, [*entries(), ("a.png", b"\0" * 10_001)], compression=zipfile.ZIP_DEFLATED)
        else:
            (save_all(path, Image.fromarray) / "a.png").write_bytes(b"\0" * 10_001)
        with pytest.raises(UserError, match=r"a\.png is not a readable PNG \(it has 10,001 bytes, more than 10,000\)"):
            read_pngs(path)


def test_a_file_that_vanishes_is_named(tmp_path, monkeypatch):
    folder, find = save_all(tmp_path, Image.fromarray), images._find_pngs

    def find_and_lose(path, archives):
        found = list(find(path, archives))
        (folder / "03.png").unlink()
        return found

    monkeypatch.setattr(images, "_find_pngs", find_and_lose)
    with pytest.raises(UserError, match=r"03\.png is not a readable PNG .*No such file"):
        read_pngs(folder)


@pytest.mark.parametrize("path", ["/dev/null", "a" * 300, "nul\0"])
def test_a_path_that_is_nothing_of_the_kind(path):
    with pytest.raises(UserError, match="--data must be a folder or a zip of PNGs"):
        load_images(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    errors = []

    def read():
        try:
            read_pngs(tmp_path / "pipe")
        except UserError as error:
            errors.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert "is neither" in errors[0]


def test_the_digits_have_a_name(monkeypatch):
    digits = torch.rand(50, images.PIXELS)
    monkeypatch.setattr(images, "read_digits", lambda: (digits, "digits"))
    for loaded in (load_images("mnist"), load_images()):
        assert (loaded.source, loaded.num_train) == ("digits", 40)
    assert load_patterns("mnist").source == "digits"
