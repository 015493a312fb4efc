"""KanervaMixer: prefill and decoding, ragged batches, caches of other libraries, compilation, files, two processes."""

import io

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastkm import MemoryState
from fastkm.nn import KanervaMixer, MixerState

B, T, D = 3, 41, 12


def mixer(**options):
    torch.manual_seed(1)
    made = KanervaMixer(D, 2, 4, **{"layer_idx": 0} | options).double()
    with torch.no_grad():
        for parameter in made.parameters():  # away from zero, so that everything counts
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def tokens(batch=B, steps=T):
    return torch.randn(batch, steps, D, dtype=torch.float64)


OPTIONS = {
    "all": {},
    "no convolution": {"use_short_conv": False},
    "no gate": {"use_output_gate": False},
    "no retention": {"use_retention": False},
    "wide values": {"expand_v": 2.0},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


@every_option
def test_prefill_and_then_decoding_is_the_whole_sequence(options):
    layer, x = mixer(**options), tokens()
    whole, _, last = layer(x, use_cache=True)
    state, parts = None, []
    for first, end in ((0, 30), (30, 32), *((t, t + 1) for t in range(32, T))):
        o, attention, state = layer(x[:, first:end], use_cache=True, state=state)
        assert attention is None
        parts.append(o)
    oracle.assert_close(torch.cat(parts, 1), whole)
    oracle.assert_close(state.memory.mean, last.memory.mean)
    oracle.assert_close(state.memory.cov, last.memory.cov)
    oracle.assert_close(state.tail, last.tail)


@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
@every_option
def test_a_ragged_batch_is_each_sequence_alone(side, options):
    """Also in two calls, the second of which is ragged too."""
    layer, x = mixer(**options), tokens()
    lengths, position = torch.tensor([[T], [20], [2]]), torch.arange(T)
    mask = {"left": position >= T - lengths, "right": position < lengths, "anywhere": torch.rand(B, T) < lengths / T}
    mask = mask[side]
    dirty = torch.where(mask.unsqueeze(-1), x, 1e3)
    together, _, last = layer(dirty, mask.long(), use_cache=True)
    state, parts = None, []
    for now in (slice(0, 17), slice(17, T)):
        o, _, state = layer(dirty[:, now], mask[:, : now.stop].long(), use_cache=True, state=state)
        parts.append(o)
    for b in range(B):
        alone, _, own = layer(x[b : b + 1, mask[b]], use_cache=True)
        oracle.assert_close(together[b, mask[b]], alone[0])
        oracle.assert_close(torch.cat(parts, 1)[b, mask[b]], alone[0])
        for made in (last, state):
            oracle.assert_close(made.memory.cov[b], own.memory.cov[0])
            oracle.assert_close(made.tail[b], own.tail[0])
    assert (together[~mask] == 0).all()


@every_option
def test_packed_sequences_are_each_alone(options):
    layer, x = mixer(**options), tokens(batch=1)
    ends = torch.tensor([0, 11, 13, T])
    packed, _, last = layer(x, use_cache=True, cu_seqlens=ends)
    for n in range(3):
        now = slice(ends[n], ends[n + 1])
        alone, _, own = layer(x[:, now], use_cache=True)
        oracle.assert_close(packed[:, now], alone)
        oracle.assert_close(last.memory.mean[n], own.memory.mean[0])
        oracle.assert_close(last.tail[n], own.tail[0])


# ---- caches --------------------------------------------------------------------------------------------------------


class DictCache:
    """As flash-linear-attention's: a dict for each layer."""

    def __init__(self):
        self.states = []

    def __len__(self):
        return len(self.states)

    def __getitem__(self, layer_idx):
        return self.states[layer_idx]

    def update(self, recurrent_state=None, attn_state=None, conv_state=None, ffn_state=None, layer_idx=0, offset=1):
        entry = {"recurrent_state": recurrent_state, "attn_state": None, "conv_state": conv_state, "ffn_state": None}
        self.states[layer_idx : layer_idx + 1] = [entry]
        return entry


class LinearAttentionLayer:
    """As transformers': states by index, in memory of their own; a convolution state is the last columns of all."""

    def __init__(self, number_of_states=2):
        self.recurrent_states, self.conv_states = (dict.fromkeys(range(number_of_states)) for _ in range(2))
        self.has_previous_state = dict.fromkeys(range(number_of_states), False)

    def update_recurrent_state(self, states, state_idx):
        if self.recurrent_states[state_idx] is None:
            self.recurrent_states[state_idx] = torch.zeros_like(states)
        self.recurrent_states[state_idx].copy_(states)

    def update_conv_state(self, states, state_idx):
        whole = torch.cat([self.conv_states[state_idx], states], -1) if self.has_previous_state[state_idx] else states
        if self.conv_states[state_idx] is None:
            self.conv_states[state_idx] = torch.zeros_like(states)
        self.conv_states[state_idx].copy_(whole[..., whole.shape[-1] - states.shape[-1] :])
        self.has_previous_state[state_idx] = True

    def reset(self):
        for state in (*self.recurrent_states.values(), *self.conv_states.values()):
            if state is not None:
                state.zero_()
        self.has_previous_state = dict.fromkeys(self.has_previous_state, False)

    def reorder_cache(self, index):
        for states in (self.recurrent_states, self.conv_states):
            for i, state in states.items():
                if state is not None:
                    states[i] = state.index_select(0, index)


class LinearAttentionCache:
    def __init__(self, layers):
        self.layers = [LinearAttentionLayer() for _ in range(layers)]

    def update_recurrent_state(self, states, layer_idx, state_idx=0, **_):
        self.layers[layer_idx].update_recurrent_state(states, state_idx)

    def update_conv_state(self, states, layer_idx, state_idx=0, **_):
        self.layers[layer_idx].update_conv_state(states, state_idx)


CACHES = {"dict": DictCache, "transformers": lambda: LinearAttentionCache(1), "list": lambda: [None]}


@pytest.mark.parametrize("make", CACHES.values(), ids=list(CACHES))
@every_option
def test_a_cache_of_any_kind_carries_the_state(make, options):
    layer, x, cache = mixer(**options), tokens(), make()
    with torch.no_grad():
        whole = layer(x)[0]
        parts = []
        for first, end in ((0, 30), (30, 31), (31, T)):
            o, attention, given_back = layer(x[:, first:end], past_key_values=cache, use_cache=True)
            assert attention is None
            assert given_back is cache
            parts.append(o)
    oracle.assert_close(torch.cat(parts, 1), whole)


def test_a_cache_that_was_reset_is_empty():
    layer, x, cache = mixer(), tokens(), LinearAttentionCache(1)
    with torch.no_grad():
        once = layer(x, past_key_values=cache)[0]
        cache.layers[0].reset()
        assert torch.equal(layer(x, past_key_values=cache)[0], once)


def test_beams_are_reordered_and_batches_repeated():
    layer, x, index = mixer(), tokens(), torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        cache = LinearAttentionCache(1)
        _, _, state = layer(x[:, :30], use_cache=True)
        layer(x[:, :30], past_key_values=cache)
        cache.layers[0].reorder_cache(index)
        expected = layer(x[index])[0][:, 30:]
        oracle.assert_close(layer(x[index, 30:], state=state.reorder(index))[0], expected)
        oracle.assert_close(layer(x[index, 30:], past_key_values=cache)[0], expected)


def test_a_layer_without_an_index_takes_no_cache():
    with pytest.raises(ValueError, match="layer_idx must be given"):
        mixer(layer_idx=None)(tokens(), past_key_values=[None])


# ---- what PyTorch does to modules ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_compiled_yet")
@every_option
def test_it_compiles_as_one_graph_forward_and_backward(options):
    layer, x = mixer(**options), tokens(steps=9).requires_grad_()
    mask = torch.rand(B, 9) < 0.7
    _, _, state = layer(tokens(steps=5), use_cache=True)
    state = MixerState(MemoryState(*(x.detach() for x in state.memory)), state.tail.detach())

    def loss(x):
        o, _, after = layer(x, mask, state=state)
        return o.square().sum() + after.memory.mean.square().sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        value = function(x)
        (to_x,) = torch.autograd.grad(value, [x], retain_graph=True)
        value.backward()
        results.append([value, to_x, *(parameter.grad.clone() for parameter in layer.parameters())])
    for eager, compiled in zip(*results, strict=True):
        oracle.assert_close(compiled, eager)


def test_every_parameter_gets_the_gradient_of_the_reference():
    found = {}
    x = tokens()
    for backend in ("native", "reference"):
        layer = mixer(backend=backend)
        layer(x)[0].square().sum().backward()
        found[backend] = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert all(x.abs().max() > 0 for x in found["native"].values())
    for name, x in found["native"].items():
        assert oracle.error(x, found["reference"][name]) <= 1e-9 * oracle.largest(x), name


def test_it_is_saved_and_loaded():
    layer, x, file = mixer(), tokens(), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = KanervaMixer(D, 2, 4).double()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x)[0], layer(x)[0])
    _, _, state = layer(x, use_cache=True)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, MixerState)
    assert torch.equal(loaded.memory.cov, state.memory.cov)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_of_low_precision_has_a_float32_state(dtype):
    layer, x = mixer().to(dtype), tokens().to(dtype)
    o, _, state = layer(x, use_cache=True)
    assert o.dtype == dtype
    assert state.memory.mean.dtype == state.memory.cov.dtype == torch.float32
    assert o.isfinite().all()


def test_autocast_leaves_the_state_in_float32():
    layer, x = mixer().float(), tokens().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, _, state = layer(x, use_cache=True)
    assert state.memory.cov.dtype == torch.float32
    exact = layer(x)[0]
    assert oracle.error(o, exact) <= 0.1 * oracle.largest(exact)


def test_what_it_starts_with():
    layer = KanervaMixer(D, 4, 8)
    x = torch.zeros(1, 1, D)
    noise = layer.noise_proj(x)
    torch.testing.assert_close(1e-2 + nn.functional.softplus(noise), torch.full_like(noise, 0.1))
    kept = layer._retention(x).flatten()
    torch.testing.assert_close(kept, torch.exp(-torch.logspace(-1, -3, 4)))
    with pytest.raises(ValueError, match="expand_v must make head_dim = 8 a whole number"):
        KanervaMixer(D, 4, 8, expand_v=1.3)


def test_it_is_made_without_memory():
    with torch.device("meta"):
        layer = KanervaMixer(D, 2, 4)
    assert layer(torch.empty(2, 3, D, device="meta"))[0].shape == (2, 3, D)


def train_on_one_of_two(rank, file, found):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    layer = DistributedDataParallel(mixer())
    torch.manual_seed(7)
    x = tokens(batch=4)
    layer(x[2 * rank : 2 * rank + 2])[0].square().sum(-1).mean().backward()
    if rank == 0:
        torch.save([parameter.grad for parameter in layer.parameters()], found)
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(tmp_path):
    mp.spawn(train_on_one_of_two, (tmp_path / "rendezvous", tmp_path / "found.pt"), nprocs=2)
    layer = mixer()
    torch.manual_seed(7)
    layer(tokens(batch=4))[0].square().sum(-1).mean().backward()
    for parameter, gradient in zip(layer.parameters(), torch.load(tmp_path / "found.pt"), strict=True):
        oracle.assert_close(gradient, parameter.grad)
