"""The edited layer is what its formula says, edits leave it again, and the page is made of what was found."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "examples").exists(), reason="needs the source tree")
pytest.importorskip("matplotlib")

SIZES = {"K": 256, "facts": 300, "edits": 200}


@pytest.fixture(scope="module")
def found():
    from examples.editing import experiment

    return experiment.main(**SIZES, steps=60)


def test_an_edit_is_the_step_of_the_paper_line_by_line():
    """RLSEdit §4.4, in float64."""
    import fastkm

    torch.manual_seed(0)
    keys, values, W = (torch.randn(n, m, dtype=torch.float64) for n, m in ((5, 12), (5, 4), (12, 4)))
    anchor = torch.randn(20, 12, dtype=torch.float64)
    C = torch.cholesky_inverse(torch.linalg.cholesky(0.5 * torch.eye(12, dtype=torch.float64) + anchor.mT @ anchor))
    C = (C + C.mT) / 2
    state = fastkm.update_posterior(fastkm.MemoryState(W[None], C[None]), keys[None], values[None], 1.0).state
    F = C @ keys.mT
    C = C - F @ torch.cholesky_solve(F.mT, torch.linalg.cholesky(torch.eye(5, dtype=torch.float64) + keys @ F))
    torch.testing.assert_close(state.cov[0], C)
    torch.testing.assert_close(state.mean[0], W + C @ keys.mT @ (values - keys @ W))


def test_the_layer_is_the_formula_with_the_edits_that_are_in_it(found):
    from examples.editing.experiment import FROZEN

    others = {when: gap for when, gap in found.gaps.items() if when != FROZEN}
    assert set(others) == {"all edits", "the first half removed", "all removed"}
    # A key is a mean of keys that the prior holds, so ΣkkᵀU is below 1, and a removal multiplies rounding by at most 4.
    allowed = 4 * torch.finfo(torch.float32).eps * found.condition
    assert all(gap < allowed for gap in others.values()), others
    assert allowed < 0.1
    assert found.gaps[FROZEN] > 10 * max(others.values())


def test_edits_take_hold_and_leave_again(found):
    edited = found.exact[-1]
    assert edited.edited == SIZES["edits"]
    assert edited.same > found.trained - 0.1
    assert edited.drift > found.exact[0].drift > 0
    assert found.restored > found.trained - 0.1
    assert found.half.same > found.trained - 0.1


def test_the_page_holds_what_was_found(found, tmp_path, monkeypatch):
    from examples.editing import __main__ as command
    from examples.editing import experiment

    monkeypatch.setattr(experiment, "main", lambda *sizes: found)
    page = command.write("the command", tmp_path, **SIZES, steps=60)
    assert (tmp_path / "results" / "editing.md").read_text(encoding="utf-8") == page
    assert (tmp_path / "images" / "editing.png").read_bytes().startswith(b"\x89PNG")
    for row in (*found.exact, *found.frozen):
        assert f"| {100 * row.drift:.2f} % |" in page
    for gap in found.gaps.values():
        assert f"| {gap:.1e} |" in page
