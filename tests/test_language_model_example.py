"""The causal language model for transformers: Auto classes, files, generation, beams, ragged prompts."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not a dependency")
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "examples").exists(), reason="needs the source tree")


@pytest.fixture
def model():
    from examples.language_model.modeling import KanervaConfig, KanervaForCausalLM

    torch.manual_seed(0)
    made = KanervaForCausalLM(KanervaConfig(vocab_size=40, hidden_size=16, head_dim=8)).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # so that no two tokens are as likely
    return made


def greedy(model, prompt, count):
    """Token by token without a cache."""
    for _ in range(count):
        with torch.no_grad():
            prompt = torch.cat([prompt, model(prompt).logits[:, -1:].argmax(-1)], 1)
    return prompt


def test_it_generates_what_it_computes_without_a_cache(model):
    prompt = torch.randint(1, 40, (3, 9))
    made = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(made, greedy(model, prompt, 12))


def test_ragged_prompts_generate_what_each_generates_alone(model):
    prompts = [torch.randint(1, 40, (1, n)) for n in (9, 4, 1)]
    width = max(p.shape[1] for p in prompts)
    padded = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (width - p.shape[1], 0)) for p in prompts])
    made = model.generate(padded, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0)
    for row, prompt in zip(made, prompts, strict=True):
        assert torch.equal(row[width:], greedy(model, prompt, 10)[0, prompt.shape[1] :])


def test_beams_carry_their_own_states(model):
    """The score of the best beam is that of its tokens, computed without a cache."""
    prompt = torch.randint(1, 40, (2, 6))
    made = model.generate(
        prompt,
        max_new_tokens=8,
        num_beams=4,
        do_sample=False,
        length_penalty=0.0,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    with torch.no_grad():
        chances = model(made.sequences).logits.log_softmax(-1)
    taken = chances[:, 5:-1].gather(-1, made.sequences[:, 6:].unsqueeze(-1)).sum((1, 2))
    torch.testing.assert_close(made.sequences_scores.double(), taken, rtol=1e-5, atol=1e-5)  # float32 in transformers


def test_it_is_saved_and_loaded_by_the_auto_classes(model, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "kanerva"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.lm_head.weight is loaded.embeddings.weight
    tokens = torch.randint(1, 40, (2, 11))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_it_learns(model):
    tokens = torch.randint(1, 40, (4, 20))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimiser.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
