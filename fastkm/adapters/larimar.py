"""The memory of IBM/larimar under its names: constructor, methods, state_dict; time before batch."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastkm._runtime import guards
from fastkm._runtime.autocast import in_float32
from fastkm.adapters.checkpoints import WholeLoading
from fastkm.adapters.layouts import exchange
from fastkm.matrix_normal import kl_memory
from fastkm.posterior import update_posterior
from fastkm.reading import ReadResult, read
from fastkm.state import MemoryState
from fastkm.writing import write

__all__ = ["GPM"]

EPSILON = 1e-6  # which Larimar adds to the prior variance


class GPM(WholeLoading):
    """``GPM`` of Larimar's ``modules/memory.py`` on the kernels of this package.

    Codes are ``[T, B, C]`` and weights ``[T, B, K]``, time first; a memory is a :class:`fastkm.MemoryState`, batch
    first. Parameters and buffers have the names and shapes of Larimar's, so its checkpoints load.

    >>> memory = GPM(code_size=768, memory_size=512, direct_writing=True, ordering=False, identity=True)
    >>> posterior, dkl_M = memory.write_to_memory(codes)
    >>> z, dkl_w = memory.read_with_encoded_input(cues, posterior)

    Direct writing addresses the prior mean, ``W = Z R0⁺``, and takes ``W⁺ Z`` as the new mean: the posterior mean of a
    memory of mean zero without noise. :func:`fastkm.update_posterior` computes it, with its covariance. Without direct
    writing an episode is written by :func:`fastkm.write`. A read is ``μ = z R⁺``, ``Rᵀ μ``.

    Where Larimar approximates a pseudo-inverse by steps, here is a solve with a small ridge λ, and a second one for
    what the first missed, which leaves an error of ``(λ/(g + λ))²`` along an eigenvector of ``R Rᵀ``, or of ``W Wᵀ``,
    with eigenvalue g.

    Args:
        code_size: C.
        memory_size: K.
        direct_writing: see above.
        ordering: have the LSTM ``lstm_z``, which ``_z_attention`` applies to an episode.
        pseudoinverse_approx_step: accepted and not used; nothing is approximated by steps.
        observation_noise_std: σ, of the noise of a code given its weights; 0 is allowed.
        identity: start with the identity as prior mean, else with unit normal noise.
        w_logvar_setting: ln σw² is 0: one number, 1: one a row, 2: linear in the code, 3: linear in the memory,
            4: linear in both.
        deterministic: a read returns ``Mᵀ μ``, else a sample.
        device: accepted and not used; a module is moved by ``.to()``.
        least_noise_var: λ of addressing. The σ² of a write, which is also the λ of ``W⁺``, is at least this times the
            largest ``wᵀUw``. None means the square root of the dtype's ε: 3.5e-4 in float32 and 1.5e-8 in float64.
        parity: leave the covariance as it is in a direct write, and use Larimar's formula for the KL of the memory.
        backend: as everywhere in this package.

    What differs from Larimar: pseudo-inverses are solved for; σ² has a floor; a direct write updates the covariance and
    its KL is that of all of it (``parity`` undoes both); no noise is added to what is written or to a cue, and none to
    a deterministic read; the memory stays on the device of its parameters.

    Numerics: memories are float32, or float64 if the parameters are. Codes may be bfloat16 or float16 beside float32,
    and so may the parameters; what is read has the dtype of the cues. With fewer
    patterns than rows a float32 memory has directions that hold rounding only; the weights of a read along them are of
    the size of that rounding over λ. Values that are read are not affected.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value.
        torch.linalg.LinAlgError: the least σ² is too small for these codes and this dtype.
        RuntimeError: ``load_state_dict`` with a missing, foreign or misshapen entry; then nothing is loaded.

    Source: Das et al., "Larimar: Large Language Models with Episodic Memory Control", ICML 2024; Pham et al.,
    "Generative Pseudo-Inverse Memory", ICLR 2022.
    """

    def __init__(
        self,
        code_size: int,
        memory_size: int,
        direct_writing: bool,
        ordering: bool,
        pseudoinverse_approx_step: int = 3,
        observation_noise_std: float = 0,
        identity: bool = False,
        w_logvar_setting: int = 0,
        deterministic: bool = False,
        device: object = 0,
        *,
        least_noise_var: float | None = None,
        parity: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        K, C = guards.count("memory_size", memory_size), guards.count("code_size", code_size)
        self._memory_size, self._code_size, self._direct_writing = K, C, direct_writing
        guards.count("pseudoinverse_approx_step", pseudoinverse_approx_step, least=0)
        self._observation_noise_std = guards.non_negative("observation_noise_std", observation_noise_std)
        self._least_noise_var = (
            None if least_noise_var is None else guards.non_negative("least_noise_var", least_noise_var)
        )
        self.deterministic, self.parity, self.backend = deterministic, parity, backend
        if w_logvar_setting not in range(5):
            raise ValueError(f"w_logvar_setting must be 0, 1, 2, 3 or 4, got {w_logvar_setting!r}")
        self._w_logvar_setting = w_logvar_setting

        inputs = {2: C, 3: C * K, 4: C + C * K}.get(w_logvar_setting)
        rows = K if w_logvar_setting else 1
        self.w_logvar: Any = nn.Linear(inputs, K) if inputs else nn.Parameter(torch.zeros(rows))
        self.memory_logvar = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.memory_mean = nn.Parameter(torch.eye(K, C) if identity else torch.randn(K, C))
        # Larimar starts its pseudo-inverses from this; it is part of its checkpoints.
        self.register_buffer("ben_cohen_memory_init", torch.full((1,), -5.0))
        if ordering:
            self.lstm_z = nn.LSTM(C, C // 2, num_layers=2, bidirectional=True)

    @in_float32
    def write_to_memory(self, input_encoded: Tensor) -> tuple[MemoryState, Tensor]:
        """Write the codes ``[T, B, C]`` into the prior. The memory, and its KL from the prior, the mean over B, 0-d."""
        codes = exchange("input_encoded", input_encoded, "[T, B, C]")
        prior = self._get_prior_state(codes.shape[0])
        posterior = self._update_state(codes, prior)
        return posterior, self._dkl_M(prior, posterior)

    @in_float32
    def read_with_encoded_input(
        self,
        input_encoded: Tensor,
        memory_state: tuple[Tensor, Tensor],
        reduce_kl: bool = True,
        get_w: bool = False,
        deterministic: bool = False,
        sigma_w: float | None = None,
    ) -> tuple[Tensor, ...]:
        """What the memory says about the cues ``[T, B, C]``.

        Args:
            input_encoded: the cues.
            memory_state: as :meth:`write_to_memory` returns it; any pair of tensors.
            reduce_kl: sum the KL over the rows of the memory.
            get_w: return weights in place of their KL.
            deterministic: no sampling in this call.
            sigma_w: standard deviation of noise that is added to the weights in any case.

        Returns:
            ``z [T, B, C]`` and the KL of the weights, ``[T, B]``, or ``[T, B, K]`` if it is not reduced. With ``get_w``
            ``z``, the weights that were used and their means ``[T, B, K]``, and ln σw², which broadcasts against them.
        """
        M = self._sample_M(memory_state)
        queries = exchange("input_encoded", input_encoded, "[T, B, C]")
        z, w_mean = (x.transpose(0, 1) for x in self._read(M, queries))
        w, w_logvar = w_mean, self._w_logvar_of(input_encoded, M)
        sampled = not (deterministic or self.deterministic)
        if sampled:
            w = w + (0.5 * w_logvar).exp() * torch.randn_like(w)
        if sigma_w:
            w = w + sigma_w * torch.randn_like(w)
        if w is not w_mean:
            z = (w.transpose(0, 1) @ M).transpose(0, 1)
        if sampled:
            z = z + self._observation_noise_std * torch.randn_like(z)
        z = z.to(input_encoded.dtype)
        if get_w:
            return z, w, w_mean, w_logvar
        dkl_w = 0.5 * (w_logvar.exp() + w_mean.square() - 1 - w_logvar)
        return z, dkl_w.sum(-1) if reduce_kl else dkl_w

    def _get_prior_state(self, batch_size: int) -> MemoryState:
        mean = self._float(self.memory_mean)
        var = self._float(self.memory_logvar).exp() + EPSILON
        cov = torch.diag_embed(var.expand(batch_size, self._memory_size))
        return MemoryState(mean.repeat(batch_size, 1, 1), cov)

    def _update_state(self, codes: Tensor, prior: MemoryState) -> MemoryState:
        mean, cov = prior
        B, T, C = codes.shape
        # All memories have one prior mean, which is factored once for the patterns of all of them.
        weights = self._read(self._float(self.memory_mean).unsqueeze(0), codes.reshape(1, B * T, C)).weights
        weights = weights.reshape(B, T, self._memory_size)
        noise_var = self._held_noise_var(weights, cov)
        if not self._direct_writing:
            ridge = max(self._observation_noise_std**2, self._ridge(mean.dtype))
            return write(prior, codes, noise_var, ridge, backend=self.backend).state
        first = update_posterior(
            MemoryState(torch.zeros_like(mean), cov), weights, codes, noise_var, backend=self.backend
        )
        again = update_posterior(MemoryState(first.state.mean, cov), weights, codes, noise_var, backend=self.backend)
        return MemoryState(again.state.mean, cov if self.parity else first.state.cov)

    @torch.no_grad()
    def _held_noise_var(self, weights: Tensor, cov: Tensor) -> Tensor:
        """σ² ``[B]``, and enough of it beside ``wᵀUw`` for the new covariance to be held."""
        energy = functional.pad((weights @ cov * weights).sum(2), (1, 0)).amax(1)  # 0 without a pattern
        least = max(self._observation_noise_std**2, torch.finfo(cov.dtype).tiny)
        return (self._ridge(cov.dtype) * energy).clamp_min(least)

    def _read(self, M: Tensor, queries: Tensor) -> ReadResult:
        """``μ = z R⁺`` and ``Rᵀ μ``, of queries ``[B, Q, C]``."""
        ridge = self._ridge(M.dtype)
        first = read(M, queries, ridge, backend=self.backend)
        rest = read(M, queries - first.values, ridge, backend=self.backend)
        return ReadResult(first.values + rest.values, first.weights + rest.weights)

    def _sample_M(self, memory_state: tuple[Tensor, Tensor]) -> Tensor:
        return guards.pair("memory_state", memory_state)[0]

    def _w_logvar_of(self, input_encoded: Tensor, M: Tensor) -> Tensor:
        """ln σw², which broadcasts against ``[T, B, K]``."""
        if self._w_logvar_setting < 2:
            return self._float(self.w_logvar)
        weight, bias, C = self.w_logvar.weight, self.w_logvar.bias, self._code_size
        z, memory = input_encoded.to(weight.dtype), M.flatten(1).to(weight.dtype)
        if self._w_logvar_setting == 2:
            return self._float(functional.linear(z, weight, bias))
        if self._w_logvar_setting == 3:
            return self._float(functional.linear(memory, weight, bias))
        return self._float(functional.linear(z, weight[:, :C]) + functional.linear(memory, weight[:, C:], bias))

    def _dkl_M(self, prior_memory: MemoryState, posterior_memory: MemoryState) -> Tensor:
        if self.parity:
            return kl_memory(posterior_memory, prior_memory, method="deepmind").mean()
        return kl_memory(posterior_memory, prior_memory, backend=self.backend).mean()

    def _z_attention(self, input_encoded: Tensor) -> Tensor:
        return self.lstm_z(input_encoded)[0]

    def _ridge(self, dtype: torch.dtype) -> float:
        return torch.finfo(dtype).eps ** 0.5 if self._least_noise_var is None else self._least_noise_var

    def _float(self, x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.float()
