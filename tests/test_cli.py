"""The commands: they run, they tell the truth, and a kernel that is wrong is neither passed nor timed."""

import argparse
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from planted import KERNELS, replace_kernel

import fastkm
from fastkm.__main__ import main
from fastkm._runtime import dispatch, schema
from fastkm.cli import bench as bench_command
from fastkm.cli import console
from fastkm.cli.doctor import capability_table
from fastkm.testing import timing, verification
from fastkm.testing.episodes import CUES, build_episode, draw_images, remarks, reverse_rows
from fastkm.testing.extras import UserError
from fastkm.testing.images import CODE_RMS, PIXELS, load_images, principal_components
from fastkm.testing.operations import CASES, GRADIENT_CASES, OPERATIONS, Case, computation
from fastkm.testing.presets import PRESETS, Preset

SMALL = Preset("small", 7, 12, 9)
README = Path(__file__).parents[1] / "README.md"
EXTRAS = ("rich", "matplotlib", "mlxtend", "PIL", "pytest_benchmark", "safetensors", "triton")


@pytest.fixture(scope="module")
def pngs(tmp_path_factory):
    """160 strokes of dark ink on white, 40 × 40, in two folders."""
    image = pytest.importorskip("PIL.Image", reason="pillow is in the bench extra")
    folder, generator = tmp_path_factory.mktemp("pngs"), torch.Generator().manual_seed(0)
    for i in range(160):
        x0, y0, x1, y1 = torch.rand(4, generator=generator).mul(36).tolist()
        page = image.new("L", (40, 40), 255)
        for t in torch.linspace(0, 1, 60).tolist():
            page.paste(0, tuple(int(a + t * (b - a)) + d for d in (0, 4) for a, b in ((x0, x1), (y0, y1))))
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        page.save(folder / "ab"[i % 2] / f"{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def images(pngs):
    return load_images(str(pngs))


@pytest.fixture
def episode(images):
    return build_episode(images, SMALL, batch=2, num_queries=6, num_iters=4)


@pytest.fixture
def bench(pngs, tmp_path, capsys):
    """Run the benchmark on preset S and return (exit status, what was printed, the records of its JSON)."""

    def run(*options):
        arguments = ["--presets", "S", "--batch", "2", "--data", str(pngs), "--output", str(tmp_path), "--threads", "1"]
        status = main(["bench", "--quick", *arguments, *options])
        return status, capsys.readouterr().out, json.loads((tmp_path / "bench.json").read_text())["records"]

    for package in ("rich", "matplotlib"):
        pytest.importorskip(package, reason="in the bench extra")
    return run


# Running the commands.


@pytest.mark.parametrize("absent", [(), EXTRAS], ids=["as installed", "no extra"])
def test_doctor_in_a_fresh_process(absent):
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import runpy; sys.argv[1:] = ['doctor']"
    code += "; runpy.run_module('fastkm', run_name='__main__', alter_sys=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for word in (*dispatch.CAPABILITIES, "extension", "instruction level", "threads", "CUDA", "Triton"):
        assert word in done.stdout
    built = schema.unavailable is None
    assert ("loaded from" in done.stdout) == built
    if not built:
        assert "install a C++ compiler" in done.stdout


def test_module_runs_as_a_command():
    command = [sys.executable, "-m", "fastkm", "capabilities"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == capability_table()


@pytest.mark.parametrize("command", ["train", "demo", "study"])
def test_a_command_that_moved_says_where_it_is(command, capsys):
    assert main([command, "--steps", "3"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert f"python -m examples.dkm.{command}" in printed.err
    assert not printed.out


def test_check_passes(pngs, capsys):
    assert main(["check", "--presets", "S", "--data", str(pngs), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "FAILED" not in out
    runs = sum(
        dispatch.why_not(operation, backend) is None
        for operation in OPERATIONS
        for backend in dispatch.CAPABILITIES[operation]
    )
    assert f"{2 * runs} of {2 * runs} within the allowed error" in out
    if schema.unavailable is None:  # what native did not check is named, for it checked the rest
        assert "native was not checked:" not in out
        assert "triton was not checked:" in out


def test_bench_writes_json_picture_and_table(bench, tmp_path):
    status, out, records = bench()
    assert status == 0
    assert "FAILED" not in out
    assert (tmp_path / "read-back.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "bench.md").read_text()
    for record in (r for r in records if r["ok"] is not None):
        assert record["seconds"]["rounds"] >= 2
        assert record["seconds"]["lower"] <= record["seconds"]["median"] <= record["seconds"]["upper"]
        assert f"{1e3 * record['seconds']['median']:.3f}" in table
    backends = {(r["operation"], r["gradient"], r["backend"]) for r in records}
    with_loop = {("read", False, "literal loop"), ("update_posterior", False, "literal loop")}
    assert backends >= with_loop | {("write", False, "reference")}
    measured = {Case(r["operation"], r["gradient"]) for r in records}
    assert backends >= {(*case, backend) for case in measured for backend in dispatch.CAPABILITIES[case.operation]}
    assert set(GRADIENT_CASES) <= measured
    report = json.loads((tmp_path / "bench.json").read_text())
    assert {"processor", "threads", "torch", "date", "instruction level"} <= report["machine"].keys()


# Options, results and terminals.


@pytest.mark.parametrize(
    "options",
    [
        ["check", "--threads", "100000"],
        ["check", "--threads", "1025"],
        ["check", "--threads", "0"],
        ["check", "--batch", "-1"],
        ["check", "--batch", "nan"],
        ["check", "--queries", str(2**63)],
        ["bench", "--iters", "9" * 5000],
        ["bench", "--batch", "\u0663"],  # a digit of another script
        ["roofline", "--batch", "1e9"],
    ],
    ids=lambda options: " ".join(options)[:30],
)
def test_numbers_out_of_range_are_refused_by_the_parser(options, capsys):
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert f"argument {options[1]}: must be a whole number from 1 to" in told
    assert len(told) < 2000


def test_as_many_threads_as_the_environment_asks_for_are_refused_too(monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 100_000)  # OMP_NUM_THREADS
    with pytest.raises(SystemExit):
        main(["check"])
    assert "--threads: must be a whole number from 1 to 1,024; got '100000'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "0", "-1", "1e999", "", "x", "1,5"])
def test_a_number_that_is_not_positive_and_finite_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a positive and finite number"):
        console.positive_number(text)
    assert console.positive_number("4e-3") == 4e-3
    if text != "0":
        with pytest.raises(argparse.ArgumentTypeError, match="must be a finite number of seconds"):
            console.duration(text)
    assert console.duration("0") == 0


@pytest.mark.parametrize("command", ["doctor", "capabilities", "roofline"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_terminal_of_another_encoding_shows_what_it_can(command, encoding, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main([command]) == 0
    stdout.flush()
    assert "write" in stdout.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize(
    "folder", ["/proc/results", "/etc/hostname/results", "a" * 300, "file", "blocked"], ids=lambda name: name[:20]
)
def test_where_results_go_is_checked_before_the_work(folder, pngs, tmp_path, monkeypatch, capsys):
    """``blocked`` has a folder in the place of one result."""
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    (tmp_path / "blocked" / "bench.md").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_command, "load_images", lambda path: pytest.fail("the work has begun"))
    assert main(["bench", "--data", str(pngs), "--output", folder]) == 2
    told = capsys.readouterr().err
    assert "cannot be written: " in told
    assert told.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bench.md", "blocked", "file"]


def test_a_backend_of_the_environment_that_does_not_exist_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "CHOSEN", "native2")
    for command in ("doctor", "check", "bench"):
        assert main([command]) == 2
        assert "FASTKM_BACKEND must be one of native, triton, reference; got 'native2'" in capsys.readouterr().err


def test_a_backend_that_cannot_run_is_an_error_in_words(capsys):
    def run(_):
        fastkm.logdet(torch.eye(2)[None], backend="triton")

    assert console.exit_status("test", run, argparse.Namespace()) == 2
    assert capsys.readouterr().err.startswith("test: backend 'triton' cannot run logdet: ")


# A kernel that is wrong.


def broken(run, error):
    """``run`` with its first output off by ``error`` of its largest entry, in one number."""

    def wrong(*arguments):
        first, *rest = run(*arguments)
        first = first.clone()
        first.view(-1)[-1] += error * first.abs().max()
        return first, *rest

    return wrong


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(
    ("kind", "error"), [(torch.float32, 1e-2), (torch.float64, 1e-9), (torch.float64, float("nan"))]
)
def test_a_wrong_kernel_is_found(kernel, backend, kind, error, episode, monkeypatch):
    if reason := dispatch.why_not(kernel, backend):
        pytest.skip(reason)
    replace_kernel(monkeypatch, kernel, backend, partial(broken, error=error))
    verdict = verification.verify(Case(kernel), episode.to(kind))[backend]
    assert verdict.ok is False
    assert "off" in verdict.note


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_wrong_kernel_is_not_timed(backend, bench, monkeypatch):
    if reason := dispatch.why_not("write", backend):
        pytest.skip(reason)
    replace_kernel(monkeypatch, "write", backend, partial(broken, error=0.1))
    status, out, records = bench()
    assert status == 1
    wrong = [r for r in records if (r["operation"], r["gradient"], r["backend"]) == ("write", False, backend)]
    assert [r["ok"] for r in wrong] == [False]
    assert not {"seconds", "per_second", "vs_reference"} & wrong[0].keys()
    assert all("seconds" in r for r in records if r["ok"])
    line = next(line for line in out.splitlines() if re.match(rf"\s*write\s+S\s+\d+\s+{backend}", line))
    assert line.split()[-1] == "FAILED"
    assert f"FAILED write S {backend}: mean is off" in out


def test_check_fails_on_a_kernel_that_raises(pngs, capsys, monkeypatch):
    def raises(*_):
        raise RuntimeError("no such instruction")

    replace_kernel(monkeypatch, "read", "reference", lambda kernel: raises)
    assert main(["check", "--presets", "S", "--data", str(pngs), "--threads", "1"]) == 1
    assert "FAILED read S float32 reference: RuntimeError: no such instruction" in capsys.readouterr().out


def test_verdict_on_missing_and_misshapen_fields():
    truth = {"mean": torch.ones(2, 3, dtype=torch.float64)}

    def verdict(result):
        return verification.compare(result, truth, {"mean": 0.0}, verification.Allowance())

    assert verdict({}).ok is False
    assert verdict({"mean": torch.ones(3, 2)}).note.startswith("mean must have shape [2, 3]")
    assert verdict({"mean": torch.ones(2, 3)}).ok is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_error_is_allowed_as_far_as_it_says(dtype):
    """``factor (rounding + roundings · eps)`` of the largest entry, in the worst field."""
    rounding, allowance, eps = 1e-5, verification.Allowance(3, 4), torch.finfo(dtype).eps
    truth = {"mean": torch.tensor([1.0, -8.0], dtype=torch.float64), "kl": torch.ones(1, dtype=torch.float64)}
    for times, ok in ((0.9, True), (1.1, False)):
        off = times * 3 * (rounding + 4 * eps) * 8
        result = {"mean": torch.tensor([1.0 + off, -8.0], dtype=dtype), "kl": torch.ones(1, dtype=dtype)}
        verdict = verification.compare(result, truth, {"mean": rounding, "kl": rounding}, allowance)
        assert verdict.ok is ok
        assert verdict.error / verdict.allowed == pytest.approx(times, rel=0.05)


# What verification stands on.


def test_every_operation_has_a_check():
    in_place = {"update_posterior_into", "write_into", "stream"}  # they change a memory; test_out and test_streaming
    assert OPERATIONS.keys() == dispatch.CAPABILITIES.keys() - in_place


@pytest.mark.parametrize("case", CASES + GRADIENT_CASES, ids=str)
def test_definition_equals_the_independent_form(case, episode):
    op = computation(case)
    truth, other = op.definition(episode), op.other(episode)
    assert truth.keys() == other.keys()
    assert max(verification.relative_errors(other, truth).values()) <= 1e-12


@pytest.mark.parametrize("case", CASES + GRADIENT_CASES, ids=str)
def test_order_of_rows_means_nothing(case, episode):
    op = computation(case)
    truth, mirrored = op.definition(episode), op.definition(episode.reverse_rows())
    expected = {name: reverse_rows(name, x) for name, x in truth.items()}
    assert max(verification.relative_errors(mirrored, expected).values()) <= 1e-12


def test_timing_takes_turns():
    calls = []
    candidates = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    timings = timing.time_in_turn(candidates, 0, shortest=0, warm_up=0)
    rounds = timings["a"].rounds
    assert rounds == timings["b"].rounds >= 2
    turns = ["".join(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert turns[:2] == ["ab", "ab"]  # how long a call takes; not timed
    assert len(turns) == 2 + rounds
    assert set(turns) <= {"ab", "ba"}, "a round has each candidate once"


# Images, codes and cues.


def test_folder_and_zip_hold_the_same_images(pngs, images, tmp_path):
    path = tmp_path / "strokes.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in pngs.rglob("*.png"):
            archive.write(file, file.relative_to(pngs))
        archive.writestr("__MACOSX/a/._000.png", "what macOS leaves in a zip")
    zipped = load_images(str(path))
    assert torch.equal(zipped.held_out, images.held_out)
    assert (zipped.num_train, len(zipped.held_out)) == (128, 32)
    assert "160 PNGs in strokes.zip" in zipped.source


def test_ink_is_bright(images):
    assert 0 <= images.held_out.min() < images.held_out.max() <= 1
    assert images.held_out.mean() < 0.5


def bad_data(kind, tmp_path):
    if kind == "missing":
        return tmp_path / "nowhere"
    if kind == "not a zip":
        (tmp_path / "file.zip").write_text("hello")
        return tmp_path / "file.zip"
    if kind == "unreadable":
        for i in range(12):
            (tmp_path / f"{i}.png").write_text("hello")
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "--data must be a folder or a zip of PNGs; there is nothing at"),
        ("not a zip", "is neither"),
        ("empty", "--data must hold at least 10 PNGs"),
        ("unreadable", "0.png is not a readable PNG"),
    ],
)
def test_bad_data_is_refused_in_words(kind, words, tmp_path, capsys):
    pytest.importorskip("PIL")
    assert main(["check", "--data", os.fspath(bad_data(kind, tmp_path))]) == 2
    assert words in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert main(["check", "--presets", "S"]) == 2
    assert "pip install fastkm[bench]" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 100, 768, PIXELS])
def test_code_keeps_what_its_components_span(size):
    pixels = torch.rand(1000, PIXELS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    code = principal_components(pixels).code(size)
    codes = code.encode(pixels)
    assert codes.shape == (1000, size)
    assert codes.square().mean().sqrt().item() == pytest.approx(CODE_RMS)  # one scale for all, no whitening
    torch.testing.assert_close(code.encode(code.decode(codes)), codes, rtol=0, atol=1e-11)
    if size == PIXELS:
        torch.testing.assert_close(code.decode(codes), pixels, rtol=0, atol=1e-12)


def test_identical_images_have_no_code():
    with pytest.raises(UserError, match="must hold images that differ"):
        principal_components(torch.zeros(20, PIXELS, dtype=torch.float64))


def test_small_data_is_remarked_on(images):
    words = remarks(images, [PRESETS["S"], PRESETS["M"]])
    assert [re.search(r"preset (\w+)", line).group(1) for line in words] == ["M", "M"]  # 128 to train, 32 held out
    assert "at most 127 directions" in words[0]
    assert "some are written twice" in words[1]


def test_no_image_twice_in_a_memory():
    held_out = torch.arange(20.0).unsqueeze(-1)
    drawn = draw_images(held_out, 3, 20, torch.Generator().manual_seed(0)).squeeze(-1)
    assert torch.equal(drawn.sort(-1).values, held_out.squeeze(-1).expand(3, 20))
    assert draw_images(held_out, 1, 45, torch.Generator()).shape == (1, 45, 1)


def test_cues_differ_from_images_as_their_names_say():
    pixels, generator = torch.rand(5, PIXELS), torch.Generator().manual_seed(0)
    clean, noisy, hidden = (corrupt(pixels.clone(), generator) for corrupt in CUES.values())
    half = PIXELS // 2
    assert torch.equal(clean, pixels)
    assert not torch.equal(noisy, pixels)
    assert 0 <= noisy.min() <= noisy.max() <= 1
    assert torch.equal(hidden[:, :half], pixels[:, :half])
    assert not hidden[:, half:].any()


# The README.


def test_readme_holds_the_capability_table():
    text = README.read_text() if README.exists() else ""
    found = re.search(r"<!-- capabilities -->(.*)<!-- /capabilities -->", text, re.DOTALL)
    if found is None:
        pytest.skip("the README has no capability markers yet")
    assert found.group(1).strip() == capability_table()
