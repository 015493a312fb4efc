"""The memory as google-deepmind/dynamic-kanerva-machines calls it: its names, its arguments, time before batch.

The letter S stands for the length of an episode, T elsewhere in this package.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from fastkm._runtime import guards
from fastkm._runtime.autocast import in_float32
from fastkm._runtime.results import result
from fastkm.adapters.checkpoints import WholeLoading
from fastkm.adapters.layouts import exchange
from fastkm.addressing import solve_addressing
from fastkm.matrix_normal import MatrixNormal, kl_memory
from fastkm.nn import memory as nn_memory
from fastkm.posterior import PosteriorUpdate, update_posterior
from fastkm.reading import read
from fastkm.state import MemoryState as Moments
from fastkm.writing import write

__all__ = ["KanervaMemory", "MemoryState", "StateUpdate"]

EPSILON = 1e-6  # which the released code adds to the prior variance


@partial(result, module=__name__)  # fastkm has a MemoryState of its own
class MemoryState(NamedTuple):
    """:class:`fastkm.MemoryState` under the released names. Either is accepted wherever a state is."""

    M_mean: Tensor  # [B, K, C]
    M_cov: Tensor  # [B, K, K]


@partial(result, module=__name__)
class StateUpdate(NamedTuple):
    """What :meth:`KanervaMemory.update_state` returns."""

    final_memory: MemoryState
    w_mean_episode: Tensor  # [S, B, K], samples of q(w) with ``sample_w``
    dkl_w_episode: Tensor  # [S, B], nats
    dkl_M_episode: Tensor  # [S, B], nats, KL(memory after pattern s ‖ before it)


class KanervaMemory(WholeLoading):
    """``KanervaMemory`` of the released code on the kernels of this package.

    Codes are ``[S, B, C]`` and weights ``[S, B, K]``, time first; memories are batch first. The model and its
    parameters are those of :class:`fastkm.KanervaMemory`, which the attribute ``memory`` is, with 1e-6 added to the
    prior variance.

    >>> memory = KanervaMemory(code_size=100, memory_size=32)
    >>> posterior, _, _, _ = memory.update_state(z_episode, memory.get_prior_state(batch_size))
    >>> read_z, dkl_w = memory.read_with_z(z_q, posterior)
    >>> dkl_M = memory.get_dkl_total(posterior)

    Args:
        code_size: C.
        memory_size: K.
        num_opt_iters: how often the weights of each pattern are solved, see :func:`fastkm.write`.
        w_prior_stddev: σ0.
        obs_noise_stddev: σ, fixed; if it is not positive, σ is learned and starts at 1.
        sample_w: use a sample of q(w) for what is read and for ``dkl_M_episode``. The mean of q(w) is written.
        sample_M: solve weights against, and read from, a sample of the memory.
        name: kept as an attribute.
        parity: compute what the released code computes where that differs from the paper. Weights solve
            ``(G² + λI) w = G R z`` with ``G = R Rᵀ``, and :meth:`get_dkl_total` uses the diagonals of the covariances
            and has no factor ½.
        backend: as everywhere in this package.

    The released code also keeps the diagonal of the covariance within [1e-6, 1e10]; here a covariance that rounding
    makes indefinite is an error.

    Numerics: float32 or float64, as its parameters are.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value.
        torch.linalg.LinAlgError: see :func:`fastkm.write`.
        RuntimeError: ``load_state_dict`` with a missing, foreign or misshapen entry; then nothing is loaded.

    Source: Wu et al., "Learning Attractor Dynamics for Generative Memory", NeurIPS 2018, and its released code.
    """

    def __init__(
        self,
        code_size: int,
        memory_size: int,
        num_opt_iters: int = 1,
        w_prior_stddev: float = 1.0,
        obs_noise_stddev: float = 1.0,
        sample_w: bool = False,
        sample_M: bool = False,
        name: str = "KanervaMemory",
        *,
        parity: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        fixed = guards.number("obs_noise_stddev", obs_noise_stddev) > 0
        self.memory = nn_memory.KanervaMemory(
            code_size,
            memory_size,
            w_prior_stddev=w_prior_stddev,
            obs_noise_stddev=obs_noise_stddev if fixed else 1.0,
            learn_obs_noise=not fixed,
            num_opt_iters=num_opt_iters,
            backend=backend,
        )
        self.name, self.parity = name, parity
        self._sample_w, self._sample_M = sample_w, sample_M
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As :class:`fastkm.KanervaMemory`, but the prior mean is drawn from a normal law cut off at two σ."""
        self.memory.reset_parameters()
        nn.init.trunc_normal_(self.memory.prior_mean)

    @property
    def prior_avg_var(self) -> Tensor:
        """The mean of the prior variance, 0-d."""
        return self.memory.prior_log_var.exp().mean() + EPSILON

    def get_prior_state(self, batch_size: int) -> MemoryState:
        """The prior of ``batch_size`` memories."""
        mean, cov = self.memory.prior_state(batch_size)
        return MemoryState(mean, cov + EPSILON * torch.eye(self.memory.memory_size, dtype=cov.dtype, device=cov.device))

    @in_float32
    def update_state(self, z: Tensor, memory_state: tuple[Tensor, Tensor]) -> StateUpdate:
        """Write the episode ``z [S, B, C]`` into ``memory_state``, one pattern after the other."""
        values, memory = exchange("z", z, "[S, B, C]"), self.memory
        if self._sample_w or self._sample_M:
            return self._update_with_samples(values, _moments(memory_state))
        written = write(
            _moments(memory_state),
            values,
            memory.noise_var,
            memory.ridge,
            num_opt_iters=memory.num_opt_iters,
            method=self._method,
            backend=memory.backend,
        )
        return self._result(written.state, written.weights, written.weights, written.kl)

    @in_float32
    def read_with_z(self, z: Tensor, memory_state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What the memory says about the cues ``z [S, B, C]``: values ``[S, B, C]``, KL of weights ``[S, B]``."""
        memory, M = self.memory, self.sample_M(memory_state)
        queries = exchange("z", z, "[S, B, C]")
        values, weights = read(M, queries, memory.ridge, method=self._method, backend=memory.backend)
        if self._sample_w:
            values = self.sample_w(weights) @ M
        return values.transpose(0, 1), self.get_dkl_w(weights).mT

    def get_dkl_total(self, memory_state: tuple[Tensor, Tensor]) -> Tensor:
        """KL(q(M) ‖ p(M)) from the prior ``[B]``, in nats; with ``parity`` the formula of the released code."""
        state = _moments(memory_state)
        prior = Moments(*self.get_prior_state(state.mean.shape[0]))
        if self.parity:
            return kl_memory(state, prior, method="deepmind")
        return kl_memory(state, prior, backend=self.memory.backend)

    def get_dkl_w(self, w_mean: Tensor) -> Tensor:
        """KL(q(w) ‖ p(w)) of ``w_mean [..., K]``, in nats."""
        return self.memory.kl_weights(w_mean)

    def sample_prior_w(self, seq_length: int, batch_size: int) -> Tensor:
        """``w ~ N(0, σ0² I)``, ``[seq_length, batch_size, K]``."""
        return self.memory.sample_prior_weights(seq_length, batch_size)

    def sample_w(self, w_mean: Tensor) -> Tensor:
        """A sample of ``N(w_mean, σw² I)`` with ``sample_w``, else ``w_mean``."""
        if not self._sample_w:
            return w_mean
        return w_mean + self.memory.log_weight_stddev.exp() * torch.randn_like(w_mean)

    def sample_M(self, memory_state: tuple[Tensor, Tensor]) -> Tensor:
        """A sample of the memory ``[B, K, C]`` with ``sample_M``, else its mean."""
        mean, cov = _moments(memory_state)
        return MatrixNormal(mean, cov).rsample() if self._sample_M else mean

    def get_w_to_z_mean(self, w_p: Tensor, R: Tensor) -> Tensor:
        """What weights ``w_p [S, B, K]`` read from ``R [B, K, C]``: ``[S, B, C]``."""
        return (exchange("w_p", w_p, "[S, B, K]") @ R).transpose(0, 1)

    def wrap_z_dist(self, z_mean: Tensor) -> Independent:
        """``N(z_mean, σ² I)`` as a distribution of codes."""
        return Independent(Normal(z_mean, self.memory.noise_var.sqrt()), 1)

    @property
    def _method(self) -> str:
        return "deepmind" if self.parity else "ridge"

    def _update_with_samples(self, values: Tensor, state: Moments) -> StateUpdate:
        """One pattern at a time, because each weight is solved against a sample, or its KL is that of one."""
        memory, steps = self.memory, []
        for z in values.split(1, dim=1):
            new = state
            for _ in range(memory.num_opt_iters):
                M = self.sample_M(new)
                mean = solve_addressing(M, z, memory.ridge, method=self._method, backend=memory.backend)
                new = self._condition(state, mean, z).state
            sample = self.sample_w(mean)
            steps.append((mean, sample, self._condition(state, sample, z).kl))
            state = new
        return self._result(state, *(torch.cat(x, dim=1) for x in zip(*steps, strict=True)))

    def _result(self, state: tuple[Tensor, Tensor], means: Tensor, samples: Tensor, kl: Tensor) -> StateUpdate:
        return StateUpdate(MemoryState(*state), samples.transpose(0, 1), self.get_dkl_w(means).mT, kl.mT)

    def _condition(self, state: Moments, weights: Tensor, values: Tensor) -> PosteriorUpdate:
        memory = self.memory
        return update_posterior(state, weights, values, memory.noise_var, backend=memory.backend)


def _moments(memory_state: tuple[Tensor, Tensor]) -> Moments:
    return Moments(*guards.pair("memory_state", memory_state, "MemoryState(M_mean, M_cov)"))
