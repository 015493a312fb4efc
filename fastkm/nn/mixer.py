"""A layer for language models: an exact Kalman filter of keys and values in every head."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastkm._runtime.results import result
from fastkm.ops.sequences import Steps, filter_heads, memory_dtype, packing
from fastkm.state import MemoryState

LEAST_NOISE = 1e-2  # of σ², beside keys of length 1: what a float32 memory holds for any number of steps
LEAST_LOG_RETENTION = -20.0  # e⁻²⁰ of a memory is gone for good; exp of much less is no float32


@result
class MixerState(NamedTuple):
    """What a :class:`KanervaMixer` carries from one part of a sequence to the next."""

    memory: MemoryState  # mean [B, H, K, V], cov [B, H, K, K]
    tail: Tensor  # [B, conv_size − 1, channels], the last inputs of the convolution; of no rows without one

    def reorder(self, index: Tensor) -> "MixerState":
        """The sequences ``index [n]``, in that order, for beams and repeated batches."""
        memory = MemoryState(*(x.index_select(0, index) for x in self.memory))
        return MixerState(memory, self.tail.index_select(0, index))


class KanervaMixer(nn.Module):
    """Mixes the tokens of a sequence by a memory per head, which is written and read at every token.

    Projections make queries, keys and values; a short causal convolution may follow. Keys and queries get length 1.
    Each token has its own noise variance σ² and retention α in every head, both learned from it, and each head a
    learned prior variance u. The head then reads the exact posterior of its memory, :func:`fastkm.filter_posterior`.

    Args:
        hidden_size: D, of the tokens that come in and go out.
        num_heads: H.
        head_dim: K, of keys and queries.
        expand_v: V = ``expand_v`` K, of values.
        use_short_conv: whether a causal convolution of each channel, with SiLU, follows the projections.
        use_output_gate: whether the heads' outputs are gated by SiLU of another projection.
        use_retention: whether memories relax to their prior; without it they keep everything.
        layer_idx: which entry of a cache is this layer's.
        conv_size: tokens that the convolution sees.
        norm_eps: of the RMS norm of each head's output.
        backend: as in :func:`fastkm.filter_posterior`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        expand_v: float = 1.0,
        use_short_conv: bool = True,
        use_output_gate: bool = True,
        use_retention: bool = True,
        layer_idx: int | None = None,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, head_dim
        self.value_dim = int(head_dim * expand_v)
        if self.value_dim != head_dim * expand_v or self.value_dim < 1:
            raise ValueError(f"expand_v must make head_dim = {head_dim} a whole number, got {expand_v}")
        self.layer_idx, self.conv_size, self.backend = layer_idx, conv_size, backend
        keys, values = num_heads * head_dim, num_heads * self.value_dim
        self.channels = (keys, keys, values)  # of queries, keys and values
        self.qkv_proj = nn.Linear(hidden_size, sum(self.channels), bias=False)
        channels = sum(self.channels)
        self.conv = nn.Conv1d(channels, channels, conv_size, groups=channels, bias=False) if use_short_conv else None
        self.noise_proj = nn.Linear(hidden_size, num_heads)
        self.decay_proj = nn.Linear(hidden_size, num_heads) if use_retention else None
        self.gate_proj = nn.Linear(hidden_size, values, bias=False) if use_output_gate else None
        self.log_prior_var = nn.Parameter(torch.empty(num_heads))
        self.norm = nn.RMSNorm(self.value_dim, eps=norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """σ² = 0.1, u = 1, and retentions from 0.9 to 0.999 over the heads; weights as PyTorch's layers draw them."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]
        with torch.no_grad():
            self.log_prior_var.zero_()
            self.noise_proj.bias.fill_(math.log(math.expm1(0.1 - LEAST_NOISE)))
            if self.decay_proj is not None:
                rates = torch.logspace(-1, -3, self.num_heads)  # −ln α
                self.decay_proj.bias.copy_(-rates.expm1().log())

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, D]
        attention_mask: Tensor | None = None,  # [B, T] or longer, of which the last T count
        past_key_values: Any = None,
        use_cache: bool = False,
        *,
        state: MixerState | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Any]:
        """The mixed tokens, None in the place of attention weights, and what was carried on.

        Args:
            hidden_states: tokens.
            attention_mask: 0 where there is no token; its output is 0. Tokens may be missing anywhere.
            past_key_values: a cache, which is read and then updated in place: that of flash-linear-attention, the
                linear-attention cache of transformers with two states a layer, or a list that holds a
                :class:`MixerState` or None for each layer.
            use_cache: whether to return a :class:`MixerState` where no cache is given.
            state: what an earlier part of the sequences left behind, in place of a cache.
            cu_seqlens: ``[N + 1]``, where sequences packed into one (B = 1) begin and end.
            kwargs: ignored; models pass more than this layer needs.
        """
        x, packed = hidden_states, None
        mask = None if attention_mask is None else attention_mask[:, -x.shape[1] :].bool()
        if cu_seqlens is not None:
            packed = packing(cu_seqlens, *x.shape[:2])
            x, mask = x[0, packed.clamp_min(0)], packed >= 0
        before = state if past_key_values is None else load_state(past_key_values, self.layer_idx)
        order = None if mask is None else mask.to(torch.int8).argsort(dim=1, stable=True)  # tokens behind the gaps
        if mask is not None and order is not None:
            x, mask = _gather(x, order), mask.gather(1, order)
        o, after = self._mix(x, mask, before)
        if order is not None:
            o = _gather(o, order.argsort(dim=1))
        if packed is not None:
            o = o[packed >= 0].unsqueeze(0)
        if past_key_values is not None:
            store_state(past_key_values, self.layer_idx, after, hidden_states.shape[1])
            return o, None, past_key_values
        return o, None, after if use_cache or state is not None else None

    def _mix(self, x: Tensor, mask: Tensor | None, before: MixerState | None) -> tuple[Tensor, MixerState]:
        """Tokens [B, T, D], those that are missing first."""
        projected = self.qkv_proj(x)
        if mask is not None:
            projected = projected * mask.unsqueeze(-1)
        projected, tail = self._convolve(projected, mask, None if before is None else before.tail)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in projected.split(self.channels, -1))
        dtype = memory_dtype(x)
        steps = Steps(
            functional.normalize(q, dim=-1),
            functional.normalize(k, dim=-1),
            v,
            LEAST_NOISE + _softplus(self.noise_proj(x).to(dtype)),
            self._retention(x),
            mask,
        )
        prior_var = self.log_prior_var.to(dtype).exp()
        memory = None if before is None else before.memory
        made, after = filter_heads(steps, memory, prior_var, "after", self.backend)
        o = self.norm(made.values.to(x.dtype)).flatten(2)
        if self.gate_proj is not None:
            o = o * functional.silu(self.gate_proj(x))
        o = self.o_proj(o)
        return o if mask is None else o * mask.unsqueeze(-1), MixerState(after, tail)

    def _retention(self, x: Tensor) -> Tensor | None:
        """α = σ(·) = exp(−softplus(−·)) [B, T, H]."""
        if self.decay_proj is None:
            return None
        return self.decay_proj(x).to(memory_dtype(x)).clamp_min(LEAST_LOG_RETENTION).sigmoid()

    def _convolve(self, x: Tensor, mask: Tensor | None, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """The causal convolution, with the inputs ``tail`` directly before the first token, and the next tail."""
        B, T, channels = x.shape
        if self.conv is None:
            return x, x.new_zeros(B, 0, channels)
        reach = self.conv_size - 1
        tail = x.new_zeros(B, reach, channels) if tail is None else tail.to(x.dtype)
        whole = torch.cat([tail, x], 1)
        if mask is not None:  # [gaps, tail, tokens] instead of [tail, gaps, tokens]
            position = torch.arange(reach + T, device=x.device).expand(B, -1)
            gaps = (~mask).sum(1, keepdim=True)
            moved = torch.where(position < gaps, position + reach, position - gaps)
            whole = _gather(whole, torch.where(position < gaps + reach, moved, position))
        mixed = self.conv(whole.transpose(1, 2)).transpose(1, 2)
        return functional.silu(mixed), whole[:, T:]


# ---- caches, by what they can do; none is imported ------------------------------------------------------------------


def load_state(cache: Any, layer_idx: int | None) -> MixerState | None:
    """The state of a layer in a cache; None before its first token."""
    if layer_idx is None:
        raise ValueError("layer_idx must be given to a layer that uses a cache")
    if hasattr(cache, "update_recurrent_state"):  # transformers
        layer = cache.layers[layer_idx]
        seen = layer.has_previous_state
        if not (seen[0] if isinstance(seen, dict) else seen):
            return None
        states = layer.recurrent_states
        return MixerState(MemoryState(states[0], states[1]), layer.conv_states[0].transpose(1, 2))
    entry = cache[layer_idx] if layer_idx < len(cache) else None
    if entry is None or isinstance(entry, MixerState):
        return entry
    if entry["recurrent_state"] is None:  # flash-linear-attention
        return None
    return MixerState(MemoryState(*entry["recurrent_state"]), entry["conv_state"])


def store_state(cache: Any, layer_idx: int | None, state: MixerState, steps: int) -> None:
    """Put the state of a layer into a cache after ``steps`` more tokens."""
    if hasattr(cache, "update_recurrent_state"):  # transformers keeps the last columns of what it is given
        for index, part in enumerate(state.memory):
            cache.update_recurrent_state(part, layer_idx, state_idx=index)
        cache.update_conv_state(state.tail.transpose(1, 2), layer_idx)
    elif hasattr(cache, "update"):  # flash-linear-attention
        recurrent = tuple(state.memory)
        cache.update(recurrent_state=recurrent, conv_state=state.tail, layer_idx=layer_idx, offset=steps)
    else:
        cache[layer_idx] = state


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index [B, n]`` of ``x [B, T, D]``."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _softplus(x: Tensor) -> Tensor:
    """The backward of torch's own returns other strides than its fake, which no compiled graph survives."""
    return torch.logaddexp(x, x.new_zeros(()))
