"""The experiments on sequences: the exact layer is what they say it is, and the page is made of what was found."""

import json
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


def test_layers_without_a_loop_are_those_with_one():
    from examples.sequences import baselines

    generator = torch.Generator().manual_seed(0)
    k, q = (torch.randn(3, 9, 5, dtype=torch.float64, generator=generator).abs() for _ in range(2))
    v, beta = torch.randn(3, 9, 4, dtype=torch.float64, generator=generator), 0.3
    delta, weighed, summed = [], [], []
    for t in range(1, 10):
        past = k[:, :t], v[:, :t]
        delta.append(q[:, t - 1 : t] @ baselines.gated_delta_rule(*past, past[0], 1.0, beta)[1])
        products = q[:, t - 1 : t] @ past[0].mT
        weighed.append((products / 5**0.5).softmax(-1) @ past[1])
        summed.append(products @ past[1] / (products.sum(-1, keepdim=True) + 1e-6))
    betas = torch.full((3, 9), beta, dtype=torch.float64)
    for name, steps, extra in (
        ("delta_rule", delta, (betas,)),
        ("softmax", weighed, ()),
        ("normalised_sum", summed, ()),
    ):
        causal, last = (getattr(baselines, f"{name}_{when}")(k, v, q, *extra) for when in ("causal", "last"))
        torch.testing.assert_close(causal, torch.cat(steps, 1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(last[:, -1], causal[:, -1], rtol=1e-12, atol=1e-12)


def test_dpfp_is_the_products_of_neighbours():
    from examples.sequences.baselines import dpfp

    x = torch.randn(5, generator=torch.Generator().manual_seed(0))
    r = [*x.relu().tolist(), *(-x).relu().tolist()]
    expected = [r[i] * r[i - j] for j in (1, 2) for i in range(10)]
    torch.testing.assert_close(dpfp(x, 2), torch.tensor(expected))


# ---- capacity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [1, 2])
def test_the_last_value_of_a_key_is_asked_for(setting):
    from examples.sequences import capacity

    keys, values = capacity.Task(setting, 7, 7 * setting).draw(5, torch.Generator().manual_seed(0))
    asked = torch.arange(7).repeat(5, 1)
    expected = [[dict(zip(k, v, strict=True)).get(key, -1) for key in range(7)] for k, v in zip(
        keys.tolist(), values.tolist(), strict=True)]  # fmt: skip
    assert capacity.last_value(keys, values, asked).tolist() == expected
    if setting == 1:
        assert keys.sort(-1).values.equal(asked)
        assert values.sort(-1).values.equal(asked)


def test_exact_reads_of_the_keys_themselves_have_the_least_loss_that_their_rank_allows():
    """K (KᵀK + λ)⁻¹ Kᵀ becomes a projection of rank K as λ goes to 0: ‖I − P‖² is S − K."""
    from fastkm import MemoryState, update_posterior

    S, K = 12, 5
    k = torch.randn(1, S, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prior = MemoryState(k.new_zeros(1, K, S), torch.eye(K, dtype=k.dtype)[None])
    read = k @ update_posterior(prior, k, torch.eye(S, dtype=k.dtype)[None], 1e-9).state.mean
    loss = 0.5 * (read - torch.eye(S, dtype=k.dtype)).square().sum(-1).mean()
    torch.testing.assert_close(loss.item(), 0.5 * (1 - K / S), rtol=1e-6, atol=0)


@pytest.mark.parametrize("setting", [1, 2])
def test_layers_learn_a_few_pairs_and_none_is_below_the_least_loss(setting, monkeypatch):
    from examples.sequences import capacity

    monkeypatch.setattr(capacity, "SIZE", 4)
    for layer in capacity.LAYERS[setting]:
        record = capacity.train(layer, setting, 6, 1, most_steps=200)
        assert record["loss"] < 0.8 * record["first"], layer
        if setting == 1 and "DPFP" not in layer:
            assert record["loss"] > 0.5 * (1 - 4 / 6)


# ---- a language model -----------------------------------------------------------------------------------------------


def test_an_answer_is_the_value_that_stands_behind_its_key():
    from examples.sequences import language

    tokens, answers = language.Task(vocabulary=64, length=32).draw(20, 3, 8, torch.Generator().manual_seed(0))
    assert (answers >= 0).sum(1).eq(8).all()
    for line, due in zip(tokens.tolist(), answers.tolist(), strict=True):
        told = dict(zip(line[0:6:2], line[1:6:2], strict=True))
        assert len(told) == 3
        assert all(0 < key < 32 <= value < 64 for key, value in told.items())
        asked = [t for t in range(32) if due[t] >= 0]
        assert min(asked) >= 6
        assert {line[t] for t in asked} == set(told)
        assert all(due[t] == told[line[t]] == line[t + 1] for t in asked)


def test_ranks_are_between_one_direction_and_all():
    from examples.sequences.language import ranks

    one, every = torch.ones(9, 4), torch.eye(4).repeat(2, 1)
    two = torch.eye(4)[[0, 0, 0, 1]]  # eigenvalues 3 and 1
    assert [x.item() for x in ranks(one)] == pytest.approx([1, 1])
    assert [x.item() for x in ranks(every)] == pytest.approx([4, 4])
    assert [x.item() for x in ranks(two)] == pytest.approx([4 / 3, 4 / 3**0.75])


def test_the_keys_that_are_ranked_are_those_that_the_mixer_writes_with(monkeypatch):
    from examples.sequences import language
    from fastkm.nn import mixer

    written, ranked = [], []
    filter_heads, ranks = mixer.filter_heads, language.ranks
    monkeypatch.setattr(
        mixer, "filter_heads", lambda steps, *rest: (written.append(steps), filter_heads(steps, *rest))[1]
    )
    monkeypatch.setattr(language, "ranks", lambda keys: (ranked.append(keys), ranks(keys))[1])
    torch.manual_seed(0)
    language.evaluate(language.Model("exact", 64), language.Task(64, 16, (2,)), 2, sequences=3)
    assert len(ranked) == len(written) == language.LAYERS
    for keys, steps in zip(ranked, written, strict=True):
        torch.testing.assert_close(torch.nn.functional.normalize(keys, dim=-1), steps.keys.transpose(1, 2))


def test_every_mixer_trains_and_is_of_the_same_size(monkeypatch):
    from examples.sequences import language

    monkeypatch.setitem(language.TASKS, "small", language.Task(vocabulary=16, length=16, pairs=(1, 2, 4), steps=4))
    found = {mixer: language.train("small", mixer, 4e-3, 1) for mixer in language.MIXERS}
    sizes = [record["parameters"] for record in found.values()]
    assert max(sizes) < 1.02 * min(sizes)
    for record in found.values():
        assert len(record["curve"]) == 4
        assert len(record["shares"]) == 3
        assert all(1 <= rank <= language.HEAD for layer in record["ranks"] for rank in layer)
    assert abs(found["exact, no retention"]["parameters"] - found["delta rule"]["parameters"]) == 2 * 2
    assert found["exact"] == language.train("small", "exact", 4e-3, 1)


# ---- the page -------------------------------------------------------------------------------------------------------


def test_a_training_that_was_stopped_goes_on_with_what_is_missing(tmp_path):
    from examples.sequences import saved

    path, trained = tmp_path / "results" / "runs.json", []

    def train(seed: int) -> dict:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(seed)
        return {"loss": seed / 4}

    runs = [{"seed": seed} for seed in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        saved.train_missing(path, runs, train)
    assert [record["seed"] for record in saved.load(path)] == [1, 2]
    trained.clear()
    assert [record["loss"] for record in saved.train_missing(path, runs, train)] == [0.25, 0.5, 0.75]
    assert trained == [3]
    assert saved.spread([1.0, 3.0]) == "2.0000 ± 1.4142"
    assert saved.spread([]) == "–"


def test_the_trained_sections_hold_what_was_saved(tmp_path):
    from examples.sequences import capacity, language

    capacities = [
        {"layer": "exact", "setting": 1, "pairs": 60, "seed": s, "loss": 0.002 * s, "steps": 900, "stopped": "solved"}
        for s in (1, 2, 3)
    ]
    page = capacity.section(capacities)
    assert "| exact | – | 0.0040 ± 0.0020 | – |" in page
    assert "| exact | – | 900 ± 0 (3 of 3) | – |" in page
    ranks = [[2.0, 3.0], [4.0, 5.0]]
    languages = [
        {"task": "256, 64", "mixer": "exact", "rate": rate, "seed": s, "parameters": 1_234, "ranks": ranks,
         "ranks before": ranks, "shares": [0.9, 0.8, x], "curve": [0.1, x]}
        for rate, x in ((4e-3, 0.3), (2e-3, 0.6)) for s in (1, 2)
    ]  # fmt: skip
    assert "| exact | 1,234 | 0.002 | 2 | 90.0 ± 0.0 | 80.0 ± 0.0 | 60.0 ± 0.0 | 2.0 ± 0.0 / 4.0 ± 0.0 |" in (
        language.section(languages)
    )
    for module, records in ((capacity, capacities), (language, languages)):
        module.draw_picture(records, str(tmp_path / "picture.png"))
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_holds_what_was_found(tmp_path, monkeypatch):
    from examples.sequences import capacity, recall, rewriting
    from examples.sequences.__main__ import write, write_section

    monkeypatch.setattr(recall, "PAIRS", (16, 32))
    monkeypatch.setattr(rewriting, "PAIRS", (8,))
    page = write(50, 2, tmp_path)
    assert (tmp_path / "results" / "sequences.md").read_text(encoding="utf-8") == page
    for picture in ("regression", "recall", "capacity", "language"):
        assert (tmp_path / "images" / f"sequences_{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("| exact |") == 3 + 4  # two tables for each setting of the capacity

    run = {"layer": "exact", "setting": 1, "pairs": 20, "seed": 1, "loss": 0.125, "steps": 100, "stopped": "solved"}
    (tmp_path / "results" / capacity.FILE).write_text(json.dumps([run]))
    section = write_section("capacity", tmp_path)
    assert "| exact | 0.1250 |" in section
    assert (tmp_path / "results" / "sequences.md").read_text(encoding="utf-8") == page.replace(
        capacity.section([]), section
    )
