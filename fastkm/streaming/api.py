"""Streams: a memory that lives, written and read one pattern after the other, in place."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastkm._linalg.reference import symmetry
from fastkm._runtime import dispatch, guards, status
from fastkm._runtime.autocast import in_float32
from fastkm._runtime.autograd import wants_gradient
from fastkm._runtime.diagnosis import raise_failures
from fastkm._runtime.operation import Operation
from fastkm._runtime.out import mark_changed
from fastkm._runtime.results import result
from fastkm._runtime.torch_private import is_transformed
from fastkm.reading import ReadResult
from fastkm.removal.api import REMOVE_PATTERNS, REPLACE_PATTERNS
from fastkm.state import MemoryState
from fastkm.streaming import native, reading, reference

__all__ = ["MemoryStream", "StreamUpdate", "StreamWrite"]

OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "native": (native.stream_patterns, native.refresh_streams),
    "reference": (reference.stream_patterns, reference.refresh_streams),
}
PADDING = 16  # the rows of a stream's matrices are a multiple of so many numbers
GRAM = "mean meanᵀ + ridge I"


@result
class StreamWrite(NamedTuple):
    """What :meth:`MemoryStream.write` returns; as the fields of :class:`fastkm.WriteResult`."""

    weights: Tensor  # [B, T, K]
    innovation_var: Tensor  # [B, T]
    kl: Tensor  # [B, T], nats


@result
class StreamUpdate(NamedTuple):
    """What :meth:`MemoryStream.update` returns; as the fields of :class:`fastkm.PosteriorUpdate`."""

    innovation_var: Tensor  # [B, T]
    kl: Tensor  # [B, T], nats
    log_evidence: Tensor  # [B], nats


class MemoryStream:
    """Memories that are written and read one pattern after the other, in place.

    A stream carries ``H = (R Rᵀ + λI)⁻¹`` from pattern to pattern. A write changes ``R Rᵀ`` by rank two, so ``H``
    follows with ``K²`` operations, where :func:`fastkm.write` pays ``K² C + K³`` for a single pattern:

    >>> stream = fastkm.MemoryStream(state, noise_var=1.0, ridge=1.0)
    >>> stream.write(values)                 # [B, T, C], the same memory as fastkm.write gives
    >>> stream.read(queries).values          # [B, Q, C]
    >>> stream.state                         # MemoryState(mean, cov), the tensors that the stream changes

    ``H`` is never trusted. Every use is checked with the residual ``R (z − Rᵀw) − λw``, taken from the memory itself,
    and corrected until that is rounding. If four corrections are not enough, ``H`` is computed anew; ``refreshes``
    counts how often. So weights and values are as good as those of the functions after any number of patterns.

    The state is copied once, here; what the caller gave is never changed. A stream computes no gradients: where
    autograd is on, a tensor that requires one is refused. Use it under :func:`torch.no_grad`, or detach what it gets.

    Args:
        state: mean ``[B, K, C]`` and cov ``[B, K, K]``, float32 or float64.
        noise_var: variance σ² of the observation noise: a float, 0-d or ``[B]``.
        ridge: λ of the addressing solve: a float, 0-d or ``[B]``.
        num_opt_iters: how often the weights of a pattern are solved, see :func:`fastkm.write`.
        backend: ``"native"`` (on a CPU), ``"reference"`` or None. The reference waits for the device once a pattern.

    Memory: ``K (C + 2K)`` numbers, and as many again as ``K²`` three times while ``H`` is computed anew.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or value.
        torch.linalg.LinAlgError: ``state.cov`` is not symmetric or not finite, or ``mean meanᵀ + ridge I`` cannot be
            factored in this dtype; names the memories.
        fastkm.BackendUnavailableError: the named backend cannot run this call.
    """

    def __init__(
        self,
        state: MemoryState,
        noise_var: float | Tensor,  # float, 0-d or [B]
        ridge: float | Tensor,  # float, 0-d or [B]
        *,
        num_opt_iters: int = 1,
        backend: str | None = None,
    ) -> None:
        signature = guards.Signature()
        mean, cov = signature.state("state", state)
        noise_var, ridge = signature.per_memory("noise_var", noise_var), signature.per_memory("ridge", ridge)
        self.num_opt_iters = guards.count("num_opt_iters", num_opt_iters)
        _refuse_gradients(mean, cov, noise_var, ridge)
        self.backend = dispatch.resolve("stream", backend, mean, cov)
        self._patterns, self._refresh = OPERATIONS[self.backend]
        self._batch, self._rows, self._columns = mean.shape
        self._mean, self._cov = _padded(mean), _padded(cov)
        self._inverse = torch.zeros_like(self._cov)
        self._noise_var, self._ridge = noise_var.detach().clone(), ridge.detach().clone()
        self._refreshes = torch.zeros(self._batch, dtype=torch.int64, device=mean.device)
        self._start()

    def _start(self) -> None:
        """Check the covariance, make it symmetric to the last bit, and compute H."""
        cov = self._cov[..., : self._rows]
        status.raise_failures(symmetry(cov), "state.cov")
        cov.copy_((cov + cov.mT) / 2)
        status.raise_failures(self._refresh(self._mean, self._inverse, self._ridge), GRAM)

    @property
    def state(self) -> MemoryState:
        """The memory now: views of what the stream changes in place. Clone what must stay as it is."""
        return MemoryState(self._mean[..., : self._columns], self._cov[..., : self._rows])

    @property
    def noise_var(self) -> Tensor:
        """σ² ``[B]``."""
        return self._noise_var

    @property
    def ridge(self) -> Tensor:
        """λ ``[B]``."""
        return self._ridge

    @property
    def refreshes(self) -> Tensor:
        """How often the inverse of each memory was computed anew since the stream began ``[B]``, int64."""
        return self._refreshes

    @in_float32
    def write(
        self,
        values: Tensor,  # [B, T, C]
        *,
        mask: Tensor | None = None,  # [B, T], bool
    ) -> StreamWrite:
        """Address each pattern and store it, as :func:`fastkm.write` does pattern by pattern.

        Args:
            values: the patterns, in order; beside a float32 memory they may be bfloat16 or float16.
            mask: where False the pattern changes nothing; its weights and ``kl`` are 0, its ``innovation_var`` is σ².

        Raises:
            TypeError, ValueError: as :func:`fastkm.write`. The stream is as before.
            torch.linalg.LinAlgError: some patterns were refused, for the reasons of :func:`fastkm.write`; names them.
                They changed nothing, and all others are written.
        """
        weights, innovation_var, kl, _ = self._run(None, values, mask)
        return StreamWrite(weights, innovation_var, kl)

    @in_float32
    def update(
        self,
        weights: Tensor,  # [B, T, K]
        values: Tensor,  # [B, T, C]
        *,
        mask: Tensor | None = None,  # [B, T], bool
    ) -> StreamUpdate:
        """Store patterns with given weights, as :func:`fastkm.update_posterior` does pattern by pattern.

        Args, Raises: as :meth:`write`; ``weights`` say how much each row takes part in each pattern.
        """
        if weights is None:  # an operator without weights would find them
            raise TypeError("weights must be a tensor of shape [B, T, K], got NoneType")
        _, innovation_var, kl, log_evidence = self._run(weights, values, mask)
        return StreamUpdate(innovation_var, kl, log_evidence)

    @in_float32
    def remove(
        self,
        weights: Tensor,  # [B, T, K]
        values: Tensor,  # [B, T, C]
        *,
        mask: Tensor | None = None,  # [B, T], bool
    ) -> None:
        """Take patterns out as if they had never been written, as :func:`fastkm.remove_patterns` does, in place.

        A memory in which they were not all there is refused as a whole: nothing of it changes, and the others lose
        their patterns. ``H`` is computed anew for the memories that changed.

        Args:
            weights: those with which the patterns were written; :meth:`write` returned them.
            values: the patterns, as they were written, with the stream's noise.
            mask: where False the pattern is not removed.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, dtype, shape or device. The stream is as before.
            torch.linalg.LinAlgError: names the memories that were refused, for the reasons of ``remove_patterns``.
        """
        if weights is None:  # the check takes none for weights to be found
            raise TypeError("weights must be a tensor of shape [B, T, K], got NoneType")
        given = self._check(weights, values, mask)
        noise = self._noise_var.unsqueeze(-1).expand(given[1].shape[:2])
        self._exchange(REMOVE_PATTERNS, (*given[:2], noise, given[2]))

    @in_float32
    def replace(
        self,
        old_weights: Tensor,  # [B, T, K]
        old_values: Tensor,  # [B, T, C]
        weights: Tensor,  # [B, T, K]
        values: Tensor,  # [B, T, C]
        *,
        mask: Tensor | None = None,  # [B, T], bool
    ) -> None:
        """Write patterns with given weights in the place of others, as :func:`fastkm.replace_patterns` does, in place.

        Args, Raises: as :meth:`remove`.
        """
        signature = self._signature()
        old_weights = signature.tensor("old_weights", old_weights, "BTK", low_precision=True)
        old_values = signature.tensor("old_values", old_values, "BTC", low_precision=True)
        weights = signature.tensor("weights", weights, "BTK", low_precision=True)
        values = signature.tensor("values", values, "BTC", low_precision=True)
        mask = signature.mask("mask", mask, "BT")
        patterns = (old_weights, old_values, weights, values)
        _refuse_gradients(*patterns)
        noise = self._noise_var.unsqueeze(-1).expand(values.shape[:2])
        self._exchange(REPLACE_PATTERNS, (*(x.detach().to(self._mean.dtype) for x in patterns), noise, noise, mask))

    @in_float32
    def read(
        self,
        queries: Tensor,  # [B, Q, C]
        num_iters: int = 1,
    ) -> ReadResult:
        """Read the memory as :func:`fastkm.read` does, with the inverse that the stream carries.

        ``w_1 = H R z`` and ``w_{i+1} = w_i − λ H w_i``, each solve corrected by its residual; ``ẑ = Rᵀ w``.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, dtype, shape, device or value.
            torch.linalg.LinAlgError: ``mean meanᵀ + ridge I`` cannot be factored in this dtype.
        """
        queries = self._signature().tensor("queries", queries, "BQC", low_precision=True)
        num_iters = guards.count("num_iters", num_iters)
        _refuse_gradients(queries)
        with torch.no_grad():
            mean, inverse = self._mean[..., : self._columns], self._inverse[..., : self._rows]
            queries = queries.to(mean.dtype)
            weights, served = reading.read(mean, inverse, queries, self._ridge, num_iters)
            for dtype in (mean.dtype, torch.float64):
                if served:
                    break
                fresh, failed = reference.invert(mean.to(dtype), self._ridge.to(dtype))
                inverse.copy_(torch.where(failed.view(-1, 1, 1), inverse, fresh.to(mean.dtype)))
                self._refreshes += 1
                weights, served = reading.read(mean, inverse, queries, self._ridge, num_iters)
            if not served:
                raise torch.linalg.LinAlgError(f"{GRAM} is too near to singular for this dtype; use a larger ridge")
            return ReadResult(weights @ mean, weights)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all that the stream holds: a stream that loads them goes on with the same bits."""
        held = {"mean": self.state.mean, "cov": self.state.cov, "inverse": self._inverse[..., : self._rows]}
        held.update(noise_var=self._noise_var, ridge=self._ridge, refreshes=self._refreshes)
        return {name: x.clone(memory_format=torch.contiguous_format) for name, x in held.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, of a stream of the same shape and dtype. The tensors are copied.

        Raises:
            TypeError, ValueError, KeyError: ``state_dict`` is not of such a stream. This one stays as it was.
        """
        held = self.state_dict()
        if state_dict.keys() != held.keys():
            raise KeyError(f"state_dict must hold {', '.join(held)}, it holds {', '.join(map(str, state_dict))}")
        for name, own in held.items():
            given = state_dict[name]
            if not isinstance(given, Tensor) or given.dtype != own.dtype or given.shape != own.shape:
                wanted = f"a {guards.dtype_name(own.dtype)} tensor of shape {list(own.shape)}"
                raise ValueError(f"state_dict[{name!r}] must be {wanted}")
        with torch.no_grad():
            self.state.mean.copy_(state_dict["mean"])
            self.state.cov.copy_(state_dict["cov"])
            self._inverse[..., : self._rows].copy_(state_dict["inverse"])
            self._noise_var.copy_(state_dict["noise_var"])
            self._ridge.copy_(state_dict["ridge"])
            self._refreshes.copy_(state_dict["refreshes"])

    def __repr__(self) -> str:
        dtype, device = guards.dtype_name(self._mean.dtype), self._mean.device
        return (
            f"MemoryStream({self._batch} × [{self._rows}, {self._columns}], {dtype} on {device}, "
            f"num_opt_iters={self.num_opt_iters}, backend={self.backend!r})"
        )

    def _signature(self) -> guards.Signature:
        signature = guards.Signature()
        signature.sizes.update(B=self._batch, K=self._rows, C=self._columns)
        signature.first = ("the memory", self._mean)
        return signature

    def _run(self, weights: Tensor | None, values: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """Hand the patterns to the operator. It refuses what the checks refuse, so a plain call runs them only then."""
        given = weights, values, mask
        if not self._is_plain(weights, values):
            given = self._check(*given)
        weights, values, mask = given
        memory = self._mean, self._cov, self._inverse, self._refreshes
        try:
            *reports, info = self._patterns(
                *memory, weights, values, self._noise_var, self._ridge, self.num_opt_iters, mask
            )
        except RuntimeError:
            self._check(*given)
            raise
        mark_changed(memory)
        if bool(info.any()):
            raise _refusal(info, weights, values)
        return tuple(reports)

    @torch.no_grad()
    def _exchange(self, operation: Operation, given: tuple) -> None:
        """Put what ``operation`` makes of each memory in its place, but of those that it refuses."""
        inputs = [*self.state, *given]
        mean, cov, info = operation.kernels[self.backend](*inputs)
        unknown = ~(mean.isfinite().flatten(1).all(-1) & cov.isfinite().flatten(1).all(-1))
        info = torch.where(unknown & (info == 0), status.NOT_POSITIVE_DEFINITE, info).int()
        weights, mask = given[0], given[-1]
        touched = weights.new_full(info.shape, weights.shape[1] > 0, dtype=torch.bool) if mask is None else mask.any(-1)
        changed = ((info == 0) & touched).view(-1, 1, 1)
        for held, new in zip(self.state, (mean, cov), strict=True):
            held.copy_(torch.where(changed, new, held))
        inverse = self._inverse.clone()
        failed = self._refresh(self._mean, inverse, self._ridge)
        refreshed = changed & (failed == 0).view(-1, 1, 1)
        self._inverse.copy_(torch.where(refreshed, inverse, self._inverse))
        self._refreshes += refreshed.flatten()
        mark_changed((self._mean, self._cov, self._inverse, self._refreshes))
        raise_failures(info, operation, inputs)

    def _is_plain(self, weights: Tensor | None, values: Tensor) -> bool:
        """Whether the operator can take the arguments as they are."""
        if self.backend != "native" or is_dynamo_compiling() or is_transformed():
            return False
        for x in (values,) if weights is None else (values, weights):
            if type(x) is not Tensor or x.requires_grad or x.dtype is not self._mean.dtype:
                return False
        # The operator knows C from the values: rows that are padded to the same length look alike to it.
        return values.dim() == 3 and values.shape[2] == self._columns

    def _check(
        self, weights: Tensor | None, values: Tensor, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """What the operator takes for the caller's arguments, or an error in words."""
        signature = self._signature()
        if weights is not None:
            weights = signature.tensor("weights", weights, "BTK", low_precision=True)
        values = signature.tensor("values", values, "BTC", low_precision=True)
        mask = signature.mask("mask", mask, "BT")
        _refuse_gradients(values, weights)
        dtype = self._mean.dtype
        return None if weights is None else weights.detach().to(dtype), values.detach().to(dtype), mask


def _padded(matrix: Tensor) -> Tensor:
    """A copy whose rows are filled up with zeros."""
    batch, rows, columns = matrix.shape
    padded = matrix.new_zeros(batch, rows, -(-columns // PADDING) * PADDING)
    padded[..., :columns].copy_(matrix.detach())
    return padded


def _refuse_gradients(*tensors: Tensor | None) -> None:
    if wants_gradient(tensors):
        raise RuntimeError(
            "a stream computes no gradients and an argument requires one; call it under torch.no_grad(), or detach the "
            "argument"
        )


def _refusal(info: Tensor, weights: Tensor | None, values: Tensor) -> torch.linalg.LinAlgError:
    """The error that names every pattern ``[memory, pattern]`` that was refused."""
    for name, x in (("weights", weights), ("values", values)):
        if x is not None and (broken := (info != 0) & ~x.isfinite().all(-1)).any():
            refused = broken.nonzero().tolist()
            return torch.linalg.LinAlgError(
                f"{name} are not finite in patterns {refused}: nothing was written for them"
            )
    reasons = [
        f"{words} by patterns {(info == code).nonzero().tolist()}"
        for code, words in status.WORDS.items()
        if bool((info == code).any())
    ]
    advice = "these changed nothing; use float64, more noise or a larger ridge"
    return torch.linalg.LinAlgError(f"the covariance or {GRAM} is {' and '.join(reasons)}: {advice}")
