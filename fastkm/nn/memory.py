"""The memory as a module: a learned prior, and the functions of this package applied to it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkm._runtime import dispatch, guards
from fastkm._runtime.autocast import in_float32
from fastkm._runtime.deferred import usable_in_trace
from fastkm._runtime.results import result
from fastkm.matrix_normal import MatrixNormal, kl_memory, kl_weights
from fastkm.reading import AttractorResult, ReadResult, attractor_read, read
from fastkm.state import MemoryState
from fastkm.writing import WriteResult, write

__all__ = ["KanervaMemory", "MemoryPass"]

WEIGHT_STDDEV = 0.3  # σw before training, as in the released DeepMind code


@result
class MemoryPass(NamedTuple):
    """What :class:`KanervaMemory` returns when it is called."""

    read: ReadResult  # values [B, Q, C], weights [B, Q, K]
    written: WriteResult  # its state is the memory after the episode


class KanervaMemory(nn.Module):
    """The memory of the Dynamic Kanerva Machine with its learned prior.

    The model of an episode ``z_1 … z_T`` of codes is::

        M [K, C] ~ MN(R0, exp(prior_log_var) I, I)    w_t ~ N(0, σ0² I)    z_t ~ N(Mᵀ w_t, σ² I)

    and ``q(w) = N(μ, σw² I)`` with μ from :func:`fastkm.solve_addressing` at ridge ``λ = σ²/σ0²``. Learned are
    ``prior_mean`` (R0), ``prior_log_var``, ``log_weight_stddev`` (ln σw) and, if asked for, ``log_noise_stddev``
    (ln σ), the last three of shape ``[1]``. R0 starts as unit normal noise: from a zero mean the first weights would be
    zero, and so would every update. A loss that starts from the prior gives each of them a gradient, zero where the
    loss does not depend on it, because DistributedDataParallel waits for all.

    The state is passed in and out and never kept in the module, so one memory serves any number of episodes:

    >>> memory = fastkm.KanervaMemory(code_size=100, memory_size=32)
    >>> state = memory.write(values).state                        # values [B, T, 100]
    >>> memory.read(cues, state).values                           # [B, Q, 100]
    >>> loss = memory.kl(state).mean()

    Args:
        code_size: C.
        memory_size: K.
        w_prior_stddev: σ0, fixed.
        obs_noise_stddev: σ, the initial value if it is learned.
        learn_obs_noise: make ln σ a parameter; otherwise it is a buffer. Either way it is part of the state_dict.
        num_opt_iters: how often :meth:`write` solves the weights of each pattern, see :func:`fastkm.write`.
        sample_w: :meth:`read` decodes a sample of q(w) instead of its mean.
        sample_memory: :meth:`read` and :meth:`generate` use a sample of q(M) instead of its mean.
        backend: who computes, for every method; None takes the first that can run each call.

    Under ``torch.autocast`` codes may be bfloat16 or float16; the memory computes in float32 and keeps its state there.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.

    Source: Wu et al., "Learning Attractor Dynamics for Generative Memory", NeurIPS 2018.
    """

    def __init__(
        self,
        code_size: int,
        memory_size: int,
        *,
        w_prior_stddev: float = 1.0,
        obs_noise_stddev: float = 1.0,
        learn_obs_noise: bool = False,
        num_opt_iters: int = 1,
        sample_w: bool = False,
        sample_memory: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.code_size = guards.count("code_size", code_size)
        self.memory_size = guards.count("memory_size", memory_size)
        self.w_prior_stddev = _positive("w_prior_stddev", w_prior_stddev)
        self.obs_noise_stddev = _positive("obs_noise_stddev", obs_noise_stddev)
        self.num_opt_iters = guards.count("num_opt_iters", num_opt_iters)
        self.sample_w, self.sample_memory = sample_w, sample_memory
        self.backend = backend if backend is None else guards.choice("backend", backend, dispatch.PREFERENCE)

        self.prior_mean = nn.Parameter(torch.empty(self.memory_size, self.code_size))  # R0 [K, C]
        # One axis, not none: fully_shard takes no 0-d parameters.
        self.prior_log_var = nn.Parameter(torch.empty(1))
        self.log_weight_stddev = nn.Parameter(torch.empty(1))
        if learn_obs_noise:
            self.log_noise_stddev = nn.Parameter(torch.empty(1))
        else:
            self.register_buffer("log_noise_stddev", torch.empty(1))
        self.register_load_state_dict_pre_hook(_add_missing_axes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """R0 ~ N(0, 1) entry by entry, U0 = I, σw = 0.3, σ = ``obs_noise_stddev``."""
        self.prior_mean.normal_()
        self.prior_log_var.zero_()
        self.log_weight_stddev.fill_(math.log(WEIGHT_STDDEV))
        self.log_noise_stddev.fill_(math.log(self.obs_noise_stddev))

    @in_float32
    def forward(
        self,
        values: Tensor,
        queries: Tensor | None = None,
        state: MemoryState | None = None,
        *,
        mask: Tensor | None = None,
        num_iters: int = 1,
    ) -> MemoryPass:
        """:meth:`write` ``values [B, T, C]``, then :meth:`read` ``queries [B, Q, C]``, or the values again.

        Wrappers such as DistributedDataParallel and fully_shard take part in this call only.
        """
        written = self.write(values, state, mask)
        return MemoryPass(self.read(values if queries is None else queries, written.state, num_iters), written)

    @property
    def noise_var(self) -> Tensor:
        """σ², 0-d."""
        return (2 * usable_in_trace(self.log_noise_stddev).squeeze(0)).exp()

    @property
    def ridge(self) -> Tensor:
        """λ = σ²/σ0², 0-d."""
        return self._ridge_of(self.noise_var)

    def _ridge_of(self, noise_var: Tensor) -> Tensor:
        return noise_var if self.w_prior_stddev == 1 else noise_var / self.w_prior_stddev**2

    @property
    def weight_var(self) -> Tensor:
        """σw², 0-d."""
        return (2 * self.log_weight_stddev.squeeze(0)).exp()

    def prior_state(self, batch_size: int) -> MemoryState:
        """The prior of ``batch_size`` memories: mean R0 ``[B, K, C]``, cov ``exp(prior_log_var) I [B, K, K]``."""
        batch_size = guards.count("batch_size", batch_size, least=0)
        var = self._prior_log_var().exp()
        cov = torch.diag_embed(var.expand(batch_size, self.memory_size))
        return MemoryState(usable_in_trace(self.prior_mean).repeat(batch_size, 1, 1), cov)

    @in_float32
    def write(self, values: Tensor, state: MemoryState | None = None, mask: Tensor | None = None) -> WriteResult:
        """Write ``values [B, T, C]`` into ``state``, or into the prior; see :func:`fastkm.write`."""
        if state is None:
            signature = self._signature()
            signature.first = ("prior_mean", self.prior_mean)
            values = signature.tensor("values", values, "BTC", low_precision=True)
            state = self.prior_state(values.shape[0])
        noise_var = self.noise_var
        ridge = self._ridge_of(noise_var)
        return write(state, values, noise_var, ridge, num_opt_iters=self.num_opt_iters, mask=mask, backend=self.backend)

    @in_float32
    def read(self, queries: Tensor, state: MemoryState, num_iters: int = 1) -> ReadResult:
        """Read ``queries [B, Q, C]`` out of ``state``; see :func:`fastkm.read`.

        With ``sample_memory`` one ``M ~ q(M)`` is drawn for the whole read and takes the place of the mean. With
        ``sample_w`` the last iteration decodes ``w ~ N(μ, σw² I)``. The weights returned are μ in every case, which is
        what :meth:`kl_weights` takes. Samples are reparametrised, so gradients reach the state and σw.
        """
        mean = self._memory(state)
        values, weights = read(mean, queries, self.ridge, num_iters=num_iters, backend=self.backend)
        if self.sample_w:
            values = (weights + self.log_weight_stddev.exp() * torch.randn_like(weights)) @ mean
        return ReadResult(values, weights)

    def attractor_read(
        self,
        queries: Tensor,
        state: MemoryState,
        *,
        clean: Callable[[Tensor], Tensor],
        num_iters: int,
        tol: float | None = None,
    ) -> AttractorResult:
        """Clean ``queries [B, Q, C]`` up with a codec in the loop; see :func:`fastkm.attractor_read`.

        Nothing is sampled: the energy it reports is an expectation over q(M) and q(w). σw enters the energy without a
        gradient.
        """
        return attractor_read(
            state,
            queries,
            self.noise_var,
            self.ridge,
            clean=clean,
            num_iters=num_iters,
            weight_var=self.weight_var.detach(),
            tol=tol,
            backend=self.backend,
        )

    def kl(self, state: MemoryState) -> Tensor:
        """KL(q(M) ‖ p(M)) ``[B]`` from the prior, exact, in nats; see :func:`fastkm.kl_memory`."""
        state = MemoryState(*guards.pair("state", state))
        return kl_memory(state, self.prior_state(state.mean.shape[0]), backend=self.backend)

    def kl_weights(self, weights: Tensor) -> Tensor:
        """KL(N(w, σw² I) ‖ N(0, σ0² I)) ``[B, Q]`` of ``weights [B, Q, K]``; see :func:`fastkm.kl_weights`."""
        return kl_weights(weights, self.weight_var, self.w_prior_stddev**2)

    def sample_prior_weights(self, *shape: int) -> Tensor:
        """``w ~ N(0, σ0² I)``, ``[*shape, K]``."""
        like = self.prior_mean
        return self.w_prior_stddev * torch.randn(*shape, self.memory_size, dtype=like.dtype, device=like.device)

    @in_float32
    def generate(
        self,
        state: MemoryState,
        num_samples: int,
        *,
        clean: Callable[[Tensor], Tensor] | None = None,
        num_iters: int = 1,
    ) -> Tensor:
        """Codes ``[B, num_samples, C]`` drawn from the memory.

        The first is ``z_1 = Mᵀ w`` with ``w ~ p(w)``; each of the ``num_iters − 1`` further iterations reads it again,
        through the codec if there is one: ``z_{i+1} = Mᵀ μ(clean(z_i))``. Without a codec, iterating only shrinks z.
        """
        num_samples = guards.count("num_samples", num_samples, least=0)
        num_iters = guards.count("num_iters", num_iters)
        memory = self._memory(state)
        codes = self.sample_prior_weights(memory.shape[0], num_samples) @ memory
        if num_iters == 1:
            return codes
        if clean is None:
            return read(memory, codes, self.ridge, num_iters=num_iters - 1, backend=self.backend).values
        codes = guards.cleaned(clean(codes), codes)
        state = MemoryState(memory, state[1])
        return self.attractor_read(codes, state, clean=clean, num_iters=num_iters - 1).values

    def extra_repr(self) -> str:
        return (
            f"code_size={self.code_size}, memory_size={self.memory_size}, w_prior_stddev={self.w_prior_stddev}, "
            f"obs_noise_stddev={self.obs_noise_stddev}, "
            f"learn_obs_noise={isinstance(self.log_noise_stddev, nn.Parameter)}, num_opt_iters={self.num_opt_iters}, "
            f"sample_w={self.sample_w}, sample_memory={self.sample_memory}, backend={self.backend!r}"
        )

    def _signature(self) -> guards.Signature:
        signature = guards.Signature()
        signature.sizes.update(K=self.memory_size, C=self.code_size)
        return signature

    def _prior_log_var(self) -> Tensor:
        """ln of the prior variance, 0-d, with a gradient of zero for the other variances that are learned."""
        if not torch.is_grad_enabled():
            return usable_in_trace(self.prior_log_var).squeeze(0)
        return torch.cat((self.prior_log_var, self.log_weight_stddev, self.log_noise_stddev))[0]

    def _memory(self, state: MemoryState) -> Tensor:
        """The memory a read uses [B, K, C]: the mean of q(M), or one sample of it."""
        mean, cov = self._signature().state("state", state)
        return MatrixNormal(mean, cov).rsample() if self.sample_memory else mean


def _positive(name: str, value: float) -> float:
    value = guards.non_negative(name, value)
    if value == 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def _add_missing_axes(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Checkpoints of version 0.1 hold the logarithms without an axis."""
    for name in ("prior_log_var", "log_weight_stddev", "log_noise_stddev"):
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor) and value.dim() == 0:
            state_dict[prefix + name] = value.reshape(1)
