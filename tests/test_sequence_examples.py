"""The experiments on sequences: the exact layer is what they say it is, and the page is made of what was found."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "examples").exists(), reason="needs the source tree")
pytest.importorskip("matplotlib")


def test_the_exact_layer_is_bayes_optimal_and_its_intervals_hold():
    from examples.sequences import regression

    found = regression.main(sequences=200, seeds=2)
    assert found.gap < 1e-3
    torch.testing.assert_close(found.errors["exact"], found.errors["Bayes optimal"], rtol=1e-4, atol=1e-6)
    counted = 2 * 200 * regression.STEPS
    for i, level in enumerate(regression.LEVELS):
        # Steps of one sequence share its w; were they all one, there would be `counted / STEPS` independent trials.
        slack = 5 * (level * (1 - level) * regression.STEPS / counted) ** 0.5
        assert abs(found.covered[:, i].mean().item() - level) < slack
    for layer in regression.LAYERS:
        assert found.errors[layer][:, -1].mean() > 2 * found.errors["exact"][:, -1].mean()


def test_conjugate_gradients_in_float32_solve_what_the_exact_layer_solves():
    from examples.sequences import recall

    k, v, *_ = recall.draw(2, 32, 0, 0.0)
    torch.testing.assert_close(recall.mesa(k, v, torch.float32), recall.LAYERS["exact"](k, v), rtol=1e-2, atol=1e-3)


def test_the_gated_delta_rule_is_the_filter_of_one_step():
    """With one pattern written the covariance has not changed yet: β = 1/(‖k‖² + σ²)."""
    from examples.sequences.baselines import exact, gated_delta_rule

    k, v = torch.nn.functional.normalize(torch.randn(3, 1, 5), dim=-1), torch.randn(3, 1, 4)
    torch.testing.assert_close(gated_delta_rule(k, v, k, 1.0, 1 / 1.1)[1], exact(k, v, k, 0.1)[2].mean)


def test_least_squares_averages_what_the_delta_rule_overwrites():
    from examples.sequences import rewriting

    k, v, *other = rewriting.draw(8, 8, 0)
    averaged = rewriting.shares(rewriting.filtered(k, v, 1e-2), k, *other)
    kept = rewriting.shares(rewriting.filtered(k, v, 1e-2, retention=0.9), k, *other)
    assert averaged[0] < 0.8
    assert kept[0] > averaged[0]
    assert averaged[1] == 1


def test_the_page_holds_what_was_found(tmp_path, monkeypatch):
    from examples.sequences import recall, rewriting
    from examples.sequences.__main__ import write

    monkeypatch.setattr(recall, "PAIRS", (16, 32))
    monkeypatch.setattr(rewriting, "PAIRS", (8,))
    page = write(50, 2, tmp_path)
    assert (tmp_path / "results" / "sequences.md").read_text(encoding="utf-8") == page
    for picture in ("regression", "recall"):
        assert (tmp_path / "images" / f"sequences_{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("| exact |") == 3
