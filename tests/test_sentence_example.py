"""The memory of sentences, with a stand-in for the encoder, which comes in packages that the tests do not install."""

import random
import sys
import zlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "examples").exists(), reason="needs the source tree")
pytest.importorskip("matplotlib")


def encode(texts: list[str]) -> torch.Tensor:
    """The sum of a random vector for each word, of length 1."""
    vectors = []
    for text in texts:
        seeds = (zlib.crc32(word.encode()) for word in text.split())
        vectors.append(sum(torch.randn(64, generator=torch.Generator().manual_seed(seed)) for seed in seeds))
    return torch.nn.functional.normalize(torch.stack(vectors), dim=-1)


@pytest.fixture(scope="module")
def facts() -> list[str]:
    generator = random.Random(0)
    return [" ".join(f"word{generator.randrange(2_000)}" for _ in range(12)) for _ in range(160)]


@pytest.fixture(scope="module")
def texts(facts):
    from examples.sentences.__main__ import load_texts

    return load_texts(facts, encode, 60)


def test_paraphrases_are_answered_and_the_unknown_is_detected(texts):
    from examples.sentences import memory

    row = memory.row(texts, 100)
    assert row.memory > 0.8
    assert row.flat > 0.9
    chance = ((100 + 60 + 1) / (12 * 100 * 60)) ** 0.5  # of the statistic of Mann and Whitney
    assert row.energy > 0.5 + 6 * chance
    empty = memory.read(memory.prior(), texts.asked, memory.codes(100))
    assert memory.share_right(empty.facts) < 0.1  # a memory that was written nothing has no answers


def test_the_nearest_vector_is_the_same_with_and_without_faiss(texts, monkeypatch):
    from examples.sentences import memory

    pytest.importorskip("faiss")
    with_faiss = memory.flat(texts.written, texts.asked)
    monkeypatch.setitem(sys.modules, "faiss", None)
    near, found = memory.flat(texts.written, texts.asked)
    torch.testing.assert_close(with_faiss[0], near)
    assert torch.equal(with_faiss[1], found)


def test_a_living_memory_is_exact(texts):
    from examples.sentences import memory

    told = memory.live(texts, 100)
    allowed = 32 * (1 + 1 / memory.NOISE_VAR) ** 2 * torch.finfo(torch.float32).eps  # ε (1 + x)² of a removal
    assert told["merged"] < allowed
    assert told["removed"] < allowed
    assert told["new answers"] > told["before"] - 0.1
    assert told["energy after"] < told["energy before"]


def test_the_page_holds_what_was_found(facts, texts, tmp_path):
    from examples.sentences import memory
    from examples.sentences.__main__ import write

    page = write(facts, encode, tmp_path, written=(40, 100), unseen=60, living=100)
    assert (tmp_path / "results" / "sentences.md").read_text(encoding="utf-8") == page
    assert (tmp_path / "images" / "sentences.png").read_bytes().startswith(b"\x89PNG")
    for count in (40, 100):
        assert f"| {count} | {100 * memory.row(texts, count).memory:.1f} % |" in page


@pytest.mark.parametrize(("package", "loader"), [("randfacts", "load_facts"), ("all_minilm_l6_v2", "load_encoder")])
def test_a_missing_package_is_named(package, loader, monkeypatch):
    from examples.sentences import encoder
    from fastkm.testing.extras import UserError

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install fastkm\[sentences\]"):
        encoder.load_facts(3) if loader == "load_facts" else encoder.load_encoder()
