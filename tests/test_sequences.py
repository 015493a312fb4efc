"""chunk_posterior, in the layout of flash-linear-attention: against MesaNet's formula, and head by head."""

import oracle
import pytest
import torch
from torch.nn.functional import normalize

from fastkm import MemoryState, filter_posterior
from fastkm.ops import chunk_posterior

B, T, H, K, V = 2, 37, 3, 6, 5
FLOAT64 = torch.float64


def heads(*, group=1, dtype=FLOAT64, batch=B, steps=T):
    q, k = (normalize(torch.randn(batch, steps, H, K, dtype=dtype), dim=-1) for _ in range(2))
    v = torch.randn(batch, steps, group * H, V, dtype=dtype)
    beta = torch.rand(batch, steps, H, dtype=dtype) + 0.5
    return q, k, v, -0.1 * torch.rand(batch, steps, H, dtype=dtype), beta


def naive_mesa(q, k, v, beta, lamb):
    """o_t = (Σ_{s ≤ t} β_s k_s k_sᵀ + diag λ)⁻¹ q_t applied to Σ β_s k_s v_sᵀ, one solve a step."""
    weighted = beta[..., None, None] * k.unsqueeze(-1)
    gram = (weighted * k.unsqueeze(-2)).cumsum(1) + torch.diag_embed(lamb)
    crossed = (weighted * v.unsqueeze(-2)).cumsum(1)
    solved = torch.cholesky_solve(q.unsqueeze(-1), torch.linalg.cholesky(gram))
    return (solved.mT @ crossed).squeeze(-2), gram[:, -1], crossed[:, -1]


def test_without_decay_it_is_the_exact_mesanet():
    q, k, v, _, beta = heads()
    lamb = 0.25 + torch.rand(H, K, dtype=FLOAT64)
    start = MemoryState(q.new_zeros(B, H, K, V), torch.diag_embed(1 / lamb).expand(B, H, K, K))
    o, state = chunk_posterior(q, k, v, None, beta, initial_state=start, output_final_state=True)
    expected, gram, crossed = naive_mesa(q, k, v, beta, lamb)
    oracle.assert_close(o, expected)
    factor = torch.linalg.cholesky(gram)
    oracle.assert_close(state.cov, torch.cholesky_inverse(factor))
    oracle.assert_close(state.mean, torch.cholesky_solve(crossed, factor))


def test_a_head_is_a_memory():
    q, k, v, g, beta = heads()
    o, state, variance = chunk_posterior(q, k, v, g, beta, output_final_state=True, output_variance=True)
    prior = MemoryState(q.new_zeros(B, K, V), torch.eye(K, dtype=FLOAT64).expand(B, K, K))
    for h in range(H):
        rows = (k[:, :, h], v[:, :, h], q[:, :, h], 1 / beta[:, :, h])
        alone = filter_posterior(prior, *rows, retention=g[:, :, h].exp())
        oracle.assert_close(o[:, :, h], alone.values)
        oracle.assert_close(variance[:, :, h], alone.variance)
        oracle.assert_close(state.mean[:, h], alone.state.mean)
        oracle.assert_close(state.cov[:, h], alone.state.cov)


def test_value_heads_of_a_group_are_heads_with_the_same_keys():
    q, k, v, g, beta = heads(group=2)
    o, state = chunk_posterior(q, k, v, g, beta, output_final_state=True)
    repeated = (x.repeat_interleave(2, 2) for x in (q, k))
    g, beta = (x.repeat_interleave(2, 2) for x in (g, beta))
    each, states = chunk_posterior(*repeated, v, g, beta, output_final_state=True)
    oracle.assert_close(o, each)
    oracle.assert_close(state.mean, states.mean)
    oracle.assert_close(state.cov.repeat_interleave(2, 1), states.cov)


def test_packed_sequences_are_each_alone():
    q, k, v, g, beta = heads(batch=1)
    ends = torch.tensor([0, 11, 11, 12, T])
    start = MemoryState(torch.randn(4, H, K, V, dtype=FLOAT64), torch.eye(K, dtype=FLOAT64).expand(4, H, K, K))
    options = {"initial_state": start, "output_final_state": True, "output_variance": True}
    o, state, variance = chunk_posterior(q, k, v, g, beta, cu_seqlens=ends, **options)
    assert o.shape == v.shape
    for n in range(4):
        now = slice(ends[n], ends[n + 1])
        options["initial_state"] = MemoryState(*(x[n : n + 1] for x in start))
        alone, last, variances = chunk_posterior(*(x[:, now] for x in (q, k, v, g, beta)), **options)
        oracle.assert_close(o[:, now], alone)
        oracle.assert_close(variance[:, now], variances)
        oracle.assert_close(state.mean[n : n + 1], last.mean)
        oracle.assert_close(state.cov[n : n + 1], last.cov)


def test_parts_of_a_sequence_carry_the_state():
    q, k, v, g, beta = heads(group=2)
    whole, last = chunk_posterior(q, k, v, g, beta, output_final_state=True)
    state, parts = None, []
    for first, end in ((0, 20), (20, 21), (21, T)):
        rows = (x[:, first:end] for x in (q, k, v, g, beta))
        o, state = chunk_posterior(*rows, initial_state=state, output_final_state=True)
        parts.append(o)
    oracle.assert_close(torch.cat(parts, 1), whole)
    oracle.assert_close(state.mean, last.mean)


def test_scale_prior_and_read():
    q, k, v, _, _ = heads()
    o, _ = chunk_posterior(q, k, v, scale=0.5, prior_var=2.0, read="before")
    state = MemoryState(q.new_zeros(B, H, K, V), 2 * torch.eye(K, dtype=FLOAT64).expand(B, H, K, K))
    oracle.assert_close(o, chunk_posterior(0.5 * q, k, v, initial_state=state, read="before")[0])
    assert (o[:, 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_of_low_precision_have_a_float32_state(dtype):
    q, k, v, g, beta = (x.to(dtype) for x in heads(dtype=torch.float32))
    o, state = chunk_posterior(q, k, v, g, beta, output_final_state=True)
    assert o.dtype == dtype
    assert state.mean.dtype == state.cov.dtype == torch.float32
    exact, _ = chunk_posterior(*(x.float() for x in (q, k, v, g, beta)))
    assert torch.equal(o, exact.to(dtype))


def test_gradients_reach_every_input():
    q, k, v, g, beta = (x.requires_grad_() for x in heads(batch=1, steps=5))
    start = MemoryState(
        torch.randn(2, H, K, V, dtype=FLOAT64, requires_grad=True),
        torch.eye(K, dtype=FLOAT64).repeat(2, H, 1, 1).requires_grad_(),
    )

    def outputs(q, k, v, g, beta, mean, cov):
        state = MemoryState(mean, (cov + cov.mT) / 2)
        options = {"cu_seqlens": torch.tensor([0, 2, 5]), "output_final_state": True, "output_variance": True}
        o, last, variance = chunk_posterior(q, k, v, g, beta, initial_state=state, **options)
        return o, *last, variance

    assert torch.autograd.gradcheck(outputs, (q, k, v, g, beta, *start))


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        (
            {"cu_seqlens": torch.tensor([0, 5, 7])},
            ValueError,
            r"cu_seqlens must rise from 0 to T = 37, got \[0, 5, 7\]",
        ),
        ({"cu_seqlens": torch.tensor([1, 37])}, ValueError, "cu_seqlens must rise from 0"),
        ({"cu_seqlens": torch.tensor([0, 9, 5, 37])}, ValueError, "cu_seqlens must rise from 0"),
        ({"cu_seqlens": torch.tensor([[0, 37]])}, ValueError, "cu_seqlens must rise from 0"),
        ({"cu_seqlens": torch.tensor([0.0, 37.0])}, TypeError, "cu_seqlens must be a tensor of int32 or int64"),
        ({"k": torch.ones(1, T, H, K + 1)}, ValueError, "k must have the shape of q"),
        ({"v": torch.ones(1, T, H + 1, V)}, ValueError, "HV a multiple of 3"),
        ({"g": torch.zeros(1, T, 2 * H)}, ValueError, "g must have one number for each key head"),
        ({"beta": torch.ones(1, T)}, ValueError, "beta must have one number for each key head"),
        ({"g": torch.full((1, T, H), 0.1)}, ValueError, "retention must be positive and at most 1"),
        ({"beta": -torch.ones(1, T, H)}, ValueError, "noise_var must be positive"),
        ({"initial_state": torch.ones(2, 3, 4)}, TypeError, "initial_state must be a MemoryState"),
        (
            {"initial_state": MemoryState(torch.zeros(2, H, K, V), torch.zeros(1, H, K, K))},
            ValueError,
            r"initial_state.mean must have shape \[1, 3, 6, 5\], got \[2, 3, 6, 5\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_words(changed, error, words):
    q, k, v, g, beta = heads(batch=1, dtype=torch.float32)
    with pytest.raises(error, match=words):
        chunk_posterior(**{"q": q, "k": k, "v": v, "g": g, "beta": beta} | changed)


def test_packed_sequences_have_a_batch_of_one():
    with pytest.raises(ValueError, match="the batch must be 1, got 2"):
        chunk_posterior(*heads(), cu_seqlens=torch.tensor([0, T]))
