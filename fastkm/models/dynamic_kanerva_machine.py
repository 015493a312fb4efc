"""The Dynamic Kanerva Machine: an encoder, the memory, a decoder, and the objective that trains them together."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from fastkm._runtime import guards
from fastkm._runtime.deferred import is_false_everywhere
from fastkm._runtime.results import result
from fastkm.addressing import solve_addressing
from fastkm.nn.memory import KanervaMemory
from fastkm.state import MemoryState
from fastkm.writing import WriteResult

__all__ = ["DynamicKanervaMachine", "EpisodeLoss", "PatternRead"]


@result
class EpisodeLoss(NamedTuple):
    """What :meth:`DynamicKanervaMachine.loss` returns: nats a pattern, averaged over the episodes, all 0-d."""

    total: Tensor  # the sum of the others
    reconstruction: Tensor  # −E ln p(x | w, M)
    kl_weights: Tensor  # KL(q(w) ‖ p(w))
    kl_memory: Tensor  # KL(q(M) ‖ p(M)) / (T num_reads)
    autoencoder: Tensor  # −ln p(x | e(x)), past the memory
    cleanup: Tensor  # −ln p(x | d(Rᵀ w_i)) averaged over the unrolled turns of the attractor dynamics; 0 without them


@result
class PatternRead(NamedTuple):
    """What :meth:`DynamicKanervaMachine.attractor_read` returns."""

    patterns: Tensor  # [B, Q, *pattern], the decoder's mean at each query's last iteration
    weights: Tensor  # [B, Q, K]
    energy: Tensor  # [B, Q, n], nats, never rising; a query that rests keeps its last energy
    num_iters: Tensor  # [B, Q], int64, the iterations each query took before it rested


class DynamicKanervaMachine(nn.Module):
    """A generative model of episodes of patterns, with a memory between its encoder and its decoder.

    An episode ``x_1 … x_T`` is encoded, ``z_t = e(x_t)``, and written into a memory with prior ``p(M)``; a pattern is
    then explained by weights of the memory's rows, decoded::

        p(x_t | w_t, M) = d(Mᵀ w_t)    p(w) = N(0, σ0² I)    q(w_t) = N(μ_t, σw² I)    (R Rᵀ + λI) μ_t = R z_t

    Training maximises a bound on the episode's log-likelihood together with the auto-encoder's (:meth:`loss`). After
    it, the memory cleans up: decode what was read, encode it again, and read again (:meth:`attractor_read`).

    >>> memory = fastkm.KanervaMemory(code_size=100, memory_size=32)
    >>> model = DynamicKanervaMachine(ConvEncoder(100), ConvDecoder(100), memory)
    >>> model.loss(images).total.backward()                              # images [B, T, 1, 28, 28]
    >>> state = model.write(images).state
    >>> model.attractor_read(corrupted, 8, state=state).patterns         # corrupted [B, Q, 1, 28, 28]

    Args:
        encoder: any module from patterns ``[N, *pattern]`` to codes ``[N, C]``.
        decoder: any module from codes ``[N, C]`` to a :class:`torch.distributions.Distribution` over patterns with
            ``batch_shape [N]`` and ``event_shape pattern``; its ``log_prob``, ``mean`` and ``mode`` are used.
        memory: a :class:`fastkm.KanervaMemory` of code size C. Its options ``sample_w`` and ``sample_memory`` are those
            of its own ``read``: here the training objective always samples w and everything else takes means.

    The mean of q(M) stands for M in every method, as in the released DeepMind code.

    Source: Wu et al., "Learning Attractor Dynamics for Generative Memory", NeurIPS 2018.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, memory: KanervaMemory) -> None:
        super().__init__()
        if not isinstance(memory, KanervaMemory):
            raise TypeError(f"memory must be a KanervaMemory, got {type(memory).__name__}")
        self.encoder, self.decoder, self.memory = encoder, decoder, memory

    def forward(
        self,
        episode: Tensor,
        mask: Tensor | None = None,
        *,
        cues: Tensor | None = None,
        num_reads: int = 1,
        unrolled: int = 0,
    ) -> EpisodeLoss:
        """The :meth:`loss`. Wrappers such as DistributedDataParallel and fully_shard take part in this call only."""
        return self.loss(episode, mask, cues=cues, num_reads=num_reads, unrolled=unrolled)

    def encode(self, patterns: Tensor, mask: Tensor | None = None) -> Tensor:
        """Codes ``[B, T, C]`` of ``patterns [B, T, *pattern]``; 0 where ``mask [B, T]`` is False.

        A masked pattern does not enter the encoder, so that batch normalisation does not see it either.
        """
        if not isinstance(patterns, Tensor):
            raise TypeError(f"patterns must be a tensor of shape [B, T, *pattern], got {type(patterns).__name__}")
        if patterns.dim() < 3 or not patterns.is_floating_point():
            got = f"{guards.dtype_name(patterns.dtype)} of shape {list(patterns.shape)}"
            raise ValueError(f"patterns must be floating point of shape [B, T, *pattern], got {got}")
        _check_mask(mask, patterns)
        return _spread(self._encode(_unmasked(patterns, mask)), patterns.shape[:2], mask)

    def _encode(self, rows: Tensor) -> Tensor:
        """Codes [N, C] of ``rows [N, *pattern]``."""
        codes = self.encoder(rows)
        wanted = (rows.shape[0], self.memory.code_size)
        if not isinstance(codes, Tensor) or tuple(codes.shape) != wanted:
            returned = list(codes.shape) if isinstance(codes, Tensor) else type(codes).__name__
            raise ValueError(f"encoder must return codes [B T, C] = {list(wanted)}, got {returned}")
        return codes

    def decode(self, codes: Tensor) -> Distribution:
        """The distribution of the patterns behind ``codes [B, T, C]``, with ``batch_shape [B T]``."""
        return self._decode(codes.flatten(0, 1))

    def _decode(self, rows: Tensor) -> Distribution:
        """The distribution of the patterns behind ``rows [N, C]``, with ``batch_shape [N]``."""
        decoded = self.decoder(rows)
        if not isinstance(decoded, Distribution):
            raise TypeError(f"decoder must return a torch.distributions.Distribution, got {type(decoded).__name__}")
        if tuple(decoded.batch_shape) != (rows.shape[0],):
            raise ValueError(
                f"decoder must return a distribution of batch_shape [{rows.shape[0]}], one for each code, whose "
                f"event_shape is that of a pattern; got batch_shape {list(decoded.batch_shape)} and event_shape "
                f"{list(decoded.event_shape)}. torch.distributions.Independent makes axes of a batch axes of the event"
            )
        return decoded

    def loss(
        self,
        episode: Tensor,
        mask: Tensor | None = None,
        *,
        cues: Tensor | None = None,
        num_reads: int = 1,
        unrolled: int = 0,
    ) -> EpisodeLoss:
        """The training objective of ``episode [B, T, *pattern]``, a negative bound to be minimised, with its parts.

        ``[ Σ_t −E ln p(x_t | w_t, M) + Σ_t KL(q(w_t) ‖ p(w_t)) + KL(q(M) ‖ p(M)) + Σ_t −ln p(x_t | d(e(x_t))) ] / T``

        with one sample of each w, averaged over the B episodes. Gradients flow through all T updates and
        solves; the attractor loop is not unrolled, unless asked for.

        Args:
            episode: the patterns x_t, written into the memory one after the other.
            mask: ``[B, T]``, leaves patterns out where it is False; T counts the others. What a pattern that is left
                out holds reaches nothing, be it NaN: neither the loss, nor a gradient, nor batch normalisation. How
                many there are decides shapes, so that ``torch.compile`` breaks its graph there.
            cues: what q(w_t) is inferred from, like ``episode``; None for the patterns themselves, as in the paper.
                The objective is a bound for any q(w); with corrupted patterns here the memory learns to be addressed
                by them.
            num_reads: how often a pattern is read after it was written once. The bound of all these reads, divided by
                their number, is the one above with KL(q(M) ‖ p(M)) / num_reads: a memory that is read more often is
                worth writing more into.
            unrolled: how many turns of the attractor dynamics from the cues add to the objective::

                    Σ_t mean over turns i of −ln p(x_t | d(Rᵀ w_i)) / T

                A turn is one of :meth:`attractor_read`: it decodes the mean of q(w), and the next one encodes the most
                likely pattern. A gradient passes that pattern as if it were the decoder's mean. It is no part of the
                bound. With it, encoding what was decoded learns to change nothing, where reads drift otherwise.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, shape or dtype.
            torch.linalg.LinAlgError: the memory left what its dtype can hold.
        """
        num_reads, unrolled = guards.count("num_reads", num_reads), guards.count("unrolled", unrolled, least=0)
        codes = self.encode(episode, mask)
        if cues is not None and (not isinstance(cues, Tensor) or cues.shape != episode.shape):
            got = list(cues.shape) if isinstance(cues, Tensor) else type(cues).__name__
            raise ValueError(f"cues must have the shape of episode, {list(episode.shape)}, got {got}")
        written = self.memory.write(codes, mask=mask)
        queries = codes if cues is None or _are_same(cues, episode, mask) else self.encode(cues, mask)
        negative_log_likelihood, kl_weights = self._conditional(episode, queries, written.state, mask)
        autoencoder, _ = self._explain(episode, codes, mask)
        cleanup = self._cleanup(episode, queries, written.state, mask, unrolled)

        if mask is None:
            counts = autoencoder.new_full(autoencoder.shape[:1], max(autoencoder.shape[1], 1))
        else:
            counts = mask.sum(1).clamp_min(1).to(autoencoder.dtype)

        def a_pattern(nats: Tensor) -> Tensor:
            """Per pattern [B, T], 0 where masked, or per episode [B], to the mean over patterns and episodes."""
            return ((nats.sum(1) if nats.dim() == 2 else nats) / counts).mean()

        parts = [
            a_pattern(x)
            for x in (
                negative_log_likelihood,
                kl_weights,
                self.memory.kl(written.state) / num_reads,
                autoencoder,
                cleanup,
            )
        ]
        return EpisodeLoss(sum(parts[1:], parts[0]), *parts)

    def write(self, episode: Tensor, state: MemoryState | None = None, mask: Tensor | None = None) -> WriteResult:
        """Write the codes of ``episode [B, T, *pattern]`` into ``state``, or the prior; see :func:`fastkm.write`."""
        return self.memory.write(self.encode(episode, mask), state, mask)

    @torch.no_grad()
    def reconstruct(self, cues: Tensor, *, state: MemoryState) -> Tensor:
        """What one read makes of ``cues [B, Q, *pattern]``: the decoder's mean, of the same shape."""
        return self.attractor_read(cues, 1, state=state).patterns

    @torch.no_grad()
    def attractor_read(
        self, cues: Tensor, num_iters: int, tol: float | None = None, *, state: MemoryState
    ) -> PatternRead:
        """Clean ``cues [B, Q, *pattern]`` up by iterating through the whole model.

        ``w_i = (R Rᵀ + λI)⁻¹ R e(x_i)``, ``x_{i+1}`` the most likely pattern of ``d(Rᵀ w_i)``, with ``x_1`` the cue.
        The energy of an iteration is that of the paper's dynamics, in pattern space::

            E(x_i, w_i) = −ln p(x_i | d(Rᵀ w_i)) + KL(N(w_i, σw² I) ‖ N(0, σ0² I))

        The step to x_{i+1} minimises it exactly; the step to w_{i+1} lowers it as far as the encoder has learned to.
        So the energy of a read never rises: an iteration that would raise it is not taken, and the query rests where
        it is. It also stops once the root mean square change of the decoder's mean is at most ``tol``, with ``tol = 0``
        at a fixed point. A query of NaN does neither. No gradient is recorded: the loop is not part of training.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, shape or dtype.
        """
        num_iters, state = guards.count("num_iters", num_iters), MemoryState(*guards.pair("state", state))
        if tol is not None:
            tol = guards.non_negative("tol", tol)
        x = cues
        energies: list[Tensor] = []
        for i in range(num_iters):
            new_weights = self._address(self.encode(x), state)
            decoded = self.decode(new_weights @ state.mean)
            nats = _nats(decoded, x.flatten(0, 1)).unflatten(0, cues.shape[:2])
            new_energy = nats + self.memory.kl_weights(new_weights)
            new_patterns, x = (y.unflatten(0, cues.shape[:2]) for y in (decoded.mean, _mode(decoded)))
            if i == 0:
                active = torch.ones_like(new_energy, dtype=torch.bool)
                taken = torch.zeros_like(active, dtype=torch.int64)
                patterns, weights, energy = new_patterns, new_weights, new_energy
                moved = torch.full_like(energy, torch.inf)
            else:
                active = active & ~(new_energy > energy)  # so a query of NaN goes on
                moved = (new_patterns - patterns).flatten(2).square().mean(-1).sqrt()
                patterns = _where(active, new_patterns, patterns)
                weights, energy = _where(active, new_weights, weights), _where(active, new_energy, energy)
            taken = taken + active
            energies.append(energy)
            if tol is not None:
                active = active & ~(moved <= tol)
            if is_false_everywhere(active):
                break
        energies += [energy] * (num_iters - len(energies))
        return PatternRead(patterns, weights, torch.stack(energies, -1), taken)

    @torch.no_grad()
    def generate(self, num_samples: int, num_iters: int = 1, *, state: MemoryState) -> Tensor:
        """Patterns ``[B, num_samples, *pattern]`` drawn from the memory, as the decoder's means.

        The first iteration decodes ``Rᵀ w`` with ``w ~ p(w)``; each of the ``num_iters − 1`` further ones reads the
        pattern again, which pulls it towards what is stored.
        """
        num_samples, state = guards.count("num_samples", num_samples), MemoryState(*guards.pair("state", state))
        num_iters = guards.count("num_iters", num_iters)
        codes = self.memory.sample_prior_weights(state.mean.shape[0], num_samples) @ state.mean
        decoded = self.decode(codes)
        if num_iters == 1:
            return decoded.mean.unflatten(0, codes.shape[:2])
        return self.attractor_read(_mode(decoded).unflatten(0, codes.shape[:2]), num_iters - 1, state=state).patterns

    @torch.no_grad()
    def conditional_bound(self, episode: Tensor, num_samples: int = 1) -> Tensor:
        """The negative conditional bound ``[B]`` of ``episode [B, T, *pattern]``, in nats a pattern: lower is better.

        ``[ Σ_t −E ln p(x_t | w_t, M) + KL(q(w_t) ‖ p(w_t)) ] / T`` with the episode written into the memory; an upper
        bound on ``−ln p(x_1 … x_T | M) / T`` at the mean of q(M). The expectation is over ``num_samples`` samples of
        each w. What the papers on this memory report; KL(q(M) ‖ p(M)) is not part of it.
        """
        num_samples = guards.count("num_samples", num_samples)
        codes = self.encode(episode)
        state = self.memory.write(codes).state
        nats = [torch.stack(self._conditional(episode, codes, state)).sum(0) for _ in range(num_samples)]
        return torch.stack(nats).mean((0, 2))

    def _cleanup(self, episode: Tensor, codes: Tensor, state: MemoryState, mask: Tensor | None, turns: int) -> Tensor:
        """−ln p of the episode [B, T], averaged over turns of the dynamics from the ``codes`` of cues."""
        nats = codes.new_zeros(episode.shape[:2])
        for i in range(turns):
            turn, decoded = self._explain(episode, self._address(codes, state) @ state.mean, mask)
            nats = nats + turn / turns
            if i + 1 < turns:
                mean = decoded.mean
                codes = _spread(self._encode(mean + (_mode(decoded) - mean).detach()), episode.shape[:2], mask)
        return nats

    def _conditional(
        self, episode: Tensor, codes: Tensor, state: MemoryState, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``−ln p(x | w, M)`` at one sample of w, and KL(w), both [B, T], 0 where masked."""
        weights = self._address(codes, state)
        # Drawn for unmasked patterns alone, so that an episode has the samples of a shorter one without the others.
        noise = _spread(torch.randn_like(_unmasked(weights, mask)), weights.shape[:2], mask)
        sampled = weights + self.memory.log_weight_stddev.exp() * noise
        kl_weights = self.memory.kl_weights(weights)
        if mask is not None:
            kl_weights = kl_weights.masked_fill(~mask, 0)
        return self._explain(episode, sampled @ state.mean, mask)[0], kl_weights

    def _address(self, codes: Tensor, state: MemoryState) -> Tensor:
        # The memory is factored again in every iteration of a read: little beside the encoder and the decoder.
        return solve_addressing(state.mean, codes, self.memory.ridge, backend=self.memory.backend)

    def _explain(self, patterns: Tensor, codes: Tensor, mask: Tensor | None) -> tuple[Tensor, Distribution]:
        """``−ln p(x | d(z))`` [B, T], 0 where masked, and the d(z) of the others; a masked code is not decoded."""
        decoded = self._decode(_unmasked(codes, mask))
        return _spread(_nats(decoded, _unmasked(patterns, mask)), patterns.shape[:2], mask), decoded


def _nats(decoded: Distribution, patterns: Tensor) -> Tensor:
    """−ln p [N] of ``patterns [N, *pattern]``."""
    if decoded.event_shape != patterns.shape[1:]:
        wanted, got = list(patterns.shape[1:]), list(decoded.event_shape)
        raise ValueError(f"decoder must return a distribution of event_shape {wanted}, that of a pattern, got {got}")
    if patterns.numel() == 0:  # torch.distributions.Independent does not take an empty batch
        return patterns.new_zeros(patterns.shape[:1])
    return -decoded.log_prob(patterns)


def _check_mask(mask: Tensor | None, patterns: Tensor) -> None:
    signature = guards.Signature()
    signature.first = ("patterns", patterns)
    signature.sizes.update(zip("BT", patterns.shape[:2], strict=True))
    signature.mask("mask", mask, "BT")


def _are_same(cues: Tensor, episode: Tensor, mask: Tensor | None) -> bool:
    """Whether the cues are the patterns themselves, so that one pass of the encoder serves both.

    Only with a mask are values compared: without one, nothing here waits for a GPU.
    """
    return cues is episode or (mask is not None and torch.equal(_unmasked(cues, mask), _unmasked(episode, mask)))


def _unmasked(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows [N, ...] of ``x [B, T, ...]`` that are not masked."""
    return x.flatten(0, 1) if mask is None else x[mask]


def _spread(rows: Tensor, sizes: torch.Size, mask: Tensor | None) -> Tensor:
    """The rows [N, ...] where they came from, [B, T, ...]; 0 where masked."""
    if mask is None:
        return rows.unflatten(0, sizes)
    return rows.new_zeros(*sizes, *rows.shape[1:]).masked_scatter(mask.reshape(*sizes, *[1] * (rows.dim() - 1)), rows)


def _mode(decoded: Distribution) -> Tensor:
    """The most likely pattern; of two equally likely values, which torch marks by NaN, the one between them."""
    return torch.where(decoded.mode.isnan(), decoded.mean, decoded.mode)


def _where(active: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` for the queries [B, Q] that are still going."""
    return torch.where(active.reshape(*active.shape, *[1] * (new.dim() - 2)), new, old)
