"""The generative model: its objective is a bound, its parts add up, its reads are those of the memory."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, MultivariateNormal, Normal

import fastkm
from fastkm import KanervaMemory
from fastkm._runtime import schema
from fastkm.models import ConvDecoder, ConvEncoder, DynamicKanervaMachine

B, T, K, C = 3, 5, 4, 6
SHAPE = (2, 4)  # of a pattern
PIXELS = math.prod(SHAPE)


class LinearEncoder(nn.Sequential):
    def __init__(self, code_size=C):
        super().__init__(nn.Flatten(), nn.Linear(PIXELS, code_size))


class GaussianDecoder(nn.Module):
    """``N(A z + b, I)``: with it everything about the model has a closed form."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, PIXELS)
        self.validate = None  # torch's default: it refuses a mean of NaN

    def forward(self, codes):
        mean = self.linear(codes).unflatten(1, SHAPE)
        return Independent(Normal(mean, 1.0, self.validate), len(SHAPE), self.validate)


def build(backend="reference", dtype=torch.float64):
    torch.manual_seed(0)
    return DynamicKanervaMachine(LinearEncoder(), GaussianDecoder(), KanervaMemory(C, K, backend=backend)).to(dtype)


def patterns(*leading, dtype=torch.float64):
    return torch.randn(*leading, *SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(1))


def test_parts_add_up_and_reach_every_parameter():
    model = build()
    loss = model.loss(patterns(B, T))
    assert loss._fields == ("total", "reconstruction", "kl_weights", "kl_memory", "autoencoder", "cleanup")
    torch.testing.assert_close(loss.total, sum(loss[1:]))
    loss.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("num_reads", [1, 3])
def test_parts_are_the_equations(num_reads):
    model, x = build(), patterns(B, T)
    torch.manual_seed(3)
    loss = model.loss(x, num_reads=num_reads)
    memory = model.memory
    codes = model.encoder(x.flatten(0, 1)).unflatten(0, (B, T))
    state = memory.write(codes).state
    weights = fastkm.solve_addressing(state.mean, codes, memory.ridge)
    torch.manual_seed(3)
    w = Normal(weights, memory.weight_var.sqrt()).mean + memory.weight_var.sqrt() * torch.randn_like(weights)

    def nats(z):
        return -Normal(model.decoder.linear(z), 1.0).log_prob(x.flatten(2)).sum(-1)

    prior = Normal(torch.zeros_like(weights), 1.0)
    kl = torch.distributions.kl_divergence(Normal(weights, memory.weight_var.sqrt()), prior).sum(-1)
    wanted = (
        nats(w @ state.mean).mean(),
        kl.mean(),
        memory.kl(state).mean() / (T * num_reads),
        nats(codes).mean(),
        torch.zeros((), dtype=torch.float64),
    )
    torch.testing.assert_close(loss[1:], wanted)


class BernoulliDecoder(nn.Module):
    """Binary patterns, whose most likely one is not the mean."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, PIXELS)

    def forward(self, codes):
        return Independent(Bernoulli(logits=self.linear(codes).unflatten(1, SHAPE), validate_args=False), len(SHAPE))


def test_turns_of_the_dynamics_are_the_equations_with_gradient():
    """Each turn reads the most likely pattern of the turn before; its gradient is that of the mean."""
    model, x = build(), (patterns(B, T) > 0.5).double()
    model.decoder = BernoulliDecoder().double()
    memory, cues = model.memory, (patterns(B, T).flip(1) > 0).double()
    used = [parameter for name, parameter in model.named_parameters() if name != "memory.log_weight_stddev"]
    found = model.loss(x, cues=cues, unrolled=3).cleanup

    state, nats, rows = memory.write(model.encode(x)).state, [], cues.flatten(0, 1)
    for _ in range(3):
        weights = fastkm.solve_addressing(state.mean, model.encoder(rows).unflatten(0, (B, T)), memory.ridge)
        logits = model.decoder.linear(weights @ state.mean)
        turn = nn.functional.binary_cross_entropy_with_logits(logits, x.flatten(2), reduction="none")
        nats.append(turn.sum(-1).mean())
        mean = logits.sigmoid()
        rows = (mean + ((logits > 0).double() - mean).detach()).flatten(0, 1).unflatten(1, SHAPE)
    torch.testing.assert_close(found, sum(nats) / 3)
    torch.testing.assert_close(torch.autograd.grad(found, used), torch.autograd.grad(sum(nats) / 3, used))


@pytest.mark.parametrize("turns", [1, 4])
def test_turns_in_training_are_those_of_a_read(turns):
    """The last of them explains a pattern as what :meth:`attractor_read` returns does, where no step is refused."""
    model, x = build(), patterns(B, T)
    state = model.write(x).state
    read = model.attractor_read(x, turns, state=state)
    assert (read.num_iters == turns).all()
    last, before = (n * model.loss(x, unrolled=n).cleanup for n in (turns, turns - 1))
    nats = -Independent(Normal(read.patterns.flatten(0, 1), 1.0), len(SHAPE)).log_prob(x.flatten(0, 1))
    torch.testing.assert_close(last - before, nats.mean())


def test_a_masked_pattern_is_as_if_it_were_not_there():
    model, x = build(), patterns(B, T)
    with torch.no_grad():
        model.memory.log_weight_stddev.fill_(-30)  # no noise to speak of: the two draw different samples
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, -2:] = False
    torch.testing.assert_close(model.loss(x, mask), model.loss(x[:, :-2]))


HOLES = [float("nan"), float("inf"), -1e30]


def normalised():
    """A model whose encoder and decoder both move every row by the mean of the batch."""
    model = build()
    model.encoder = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, C), nn.BatchNorm1d(C)).double()
    model.decoder.linear = nn.Sequential(nn.BatchNorm1d(C), nn.Linear(C, PIXELS)).double()
    return model


def loss_and_gradients(model, *arguments, **options):
    torch.manual_seed(3)
    model.zero_grad()
    loss = model.loss(*arguments, **options)
    loss.total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss, gradients, {name: buffer.clone() for name, buffer in model.named_buffers()}


def masked(*holes):
    mask = torch.ones(B, T, dtype=torch.bool)
    for hole in holes:
        mask[hole] = False
    return mask


@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("where", ["episode", "cues", "both"])
@pytest.mark.parametrize("unrolled", [0, 2])
def test_what_a_masked_pattern_holds_reaches_nothing(hole, where, unrolled):
    """Not the loss, no gradient, and through batch normalisation no other pattern and no running mean."""
    mask, x, cues = masked((0, 3), (2, 0), (2, 1)), patterns(B, T), patterns(B, T).flip(1)
    spoilt = x.masked_fill(~mask[..., None, None], hole), cues.masked_fill(~mask[..., None, None], hole)
    want = loss_and_gradients(normalised(), x, mask, cues=cues, unrolled=unrolled)
    episode, other = spoilt[0] if where != "cues" else x, spoilt[1] if where != "episode" else cues
    found = loss_and_gradients(normalised(), episode, mask, cues=other, unrolled=unrolled)
    torch.testing.assert_close(found, want, rtol=0, atol=0)


@pytest.mark.parametrize("cues", [False, True])
def test_masked_patterns_are_as_if_the_episode_were_shorter(cues):
    """Everything is bitwise equal, the samples of w too."""
    x, other = patterns(B, T), patterns(B, T).flip(1)
    short = {"cues": other[:, :-2]} if cues else {}
    want = loss_and_gradients(normalised(), x[:, :-2], **short)
    mask = torch.arange(T).expand(B, T) < T - 2
    found = loss_and_gradients(normalised(), x, mask, **({"cues": other} if cues else {}))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-14)


def test_a_mask_that_masks_nothing_is_none():
    x = patterns(B, T)
    want, found = (loss_and_gradients(normalised(), x, mask) for mask in (None, masked()))
    torch.testing.assert_close(found, want, rtol=0, atol=0)


def test_cues_that_are_the_patterns_cost_nothing_more():
    x, mask = patterns(B, T), masked((1, 2))
    want = loss_and_gradients(normalised(), x, mask)
    for cues in (x, x.masked_fill(~mask[..., None, None], math.nan)):
        torch.testing.assert_close(loss_and_gradients(normalised(), x, mask, cues=cues), want, rtol=0, atol=0)


def test_a_masked_pattern_is_not_written():
    model, x, mask = normalised(), patterns(B, T), masked((0, 1), (1, 4))
    hole = x.masked_fill(~mask[..., None, None], math.nan)
    written = normalised().write(hole, mask=mask)
    torch.testing.assert_close(written, model.write(x, mask=mask), rtol=0, atol=0)
    assert all(y.isfinite().all() for y in (*written.state, *written[1:]))
    assert (model.encode(x, mask)[~mask] == 0).all()


@pytest.mark.parametrize("model", [build, normalised])
def test_an_episode_of_no_patterns_has_no_loss(model):
    for x, mask in ((patterns(B, 0), None), (patterns(B, T) * math.nan, torch.zeros(B, T, dtype=torch.bool))):
        loss, _, buffers = loss_and_gradients(model(), x, mask)
        torch.testing.assert_close(torch.stack(loss), torch.zeros(6, dtype=x.dtype))
        assert all(buffer.isfinite().all() for buffer in buffers.values())


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (torch.ones(B, T), TypeError, "mask must be a bool tensor of shape [B, T] = [3, 5], got float32"),
        (torch.ones(B, 1, dtype=torch.bool), ValueError, "mask must have shape [B, T] = [3, 5], got [3, 1]"),
        (torch.ones(T, dtype=torch.bool), ValueError, "mask must have shape [B, T] = [3, 5], got [5]"),
        ([[True] * T] * B, TypeError, "mask must be a bool tensor of shape [B, T] = [3, 5], got list"),
    ],
)
def test_a_wrong_mask_is_named(mask, error, words):
    for call in (build().loss, build().encode, lambda x, mask: build().write(x, mask=mask)):
        with pytest.raises(error) as caught:
            call(patterns(B, T), mask=mask)
        assert words in str(caught.value)


class WrongDecoder(nn.Module):
    """What a decoder may get wrong: axes of the event that are not declared, too few rows, another pattern."""

    def __init__(self, shape=SHAPE, independent=0, rows=None, batch=()):
        super().__init__()
        self.shape, self.independent, self.rows, self.batch = shape, independent, rows, batch

    def forward(self, codes):
        mean = codes.new_zeros(*codes.shape[:1], *self.batch, *self.shape)[: self.rows]
        return Independent(Normal(mean, 1.0), self.independent) if self.independent else Normal(mean, 1.0)


@pytest.mark.parametrize(
    ("decoder", "words"),
    [
        (WrongDecoder(), "batch_shape [{N}, 2, 4] and event_shape []"),
        (WrongDecoder(independent=1), "batch_shape [{N}, 2] and event_shape [4]"),
        (WrongDecoder(independent=3), "batch_shape [] and event_shape [{N}, 2, 4]"),
        (WrongDecoder(independent=2, rows=-1), "and event_shape [2, 4]"),
        (WrongDecoder(independent=2, batch=(1,)), "batch_shape [{N}, 1] and event_shape [2, 4]"),
        (WrongDecoder(shape=(4,), independent=1), "event_shape [2, 4], that of a pattern, got [4]"),
        (WrongDecoder(shape=(1, 4), independent=2), "event_shape [2, 4], that of a pattern, got [1, 4]"),
    ],
)
@pytest.mark.parametrize(("batch", "length"), [(1, 4), (4, 4), (4, 1), (1, 1), (2, 4), (3, 2)])
def test_a_decoder_of_other_axes_is_refused(decoder, words, batch, length):
    """Whatever sizes coincide."""
    model, x = build(), patterns(batch, length)
    state = model.write(x).state
    model.decoder = decoder
    calls = [lambda: model.loss(x), lambda: model.conditional_bound(x), lambda: model.attractor_read(x, 2, state=state)]
    if decoder.shape == SHAPE:  # what it generates has the shape of a pattern
        calls.append(lambda: model.generate(length, state=state))
    for call in calls:
        with pytest.raises(ValueError, match="decoder must return a distribution") as caught:
            call()
        assert words.format(N=batch * length) in str(caught.value)


def test_a_query_of_nan_never_settles():
    model, x = build(), patterns(B, T)
    model.decoder.validate = False
    state = model.write(x).state
    spoilt = x.clone()
    spoilt[1, 2] = math.nan
    read, clean = (model.attractor_read(cues, 4, 1e9, state=state) for cues in (spoilt, x))
    assert (clean.num_iters == 2).all()
    assert read.num_iters[1, 2] == 4
    others = masked((1, 2))
    assert (read.num_iters[others] == 2).all()
    torch.testing.assert_close(read.patterns[others], clean.patterns[others])


def test_an_episode_without_patterns_costs_what_its_memory_costs():
    """All of them masked: nothing is read, and its memory is the prior."""
    model, x = build(), patterns(B, T)
    loss = model.loss(x, torch.zeros(B, T, dtype=torch.bool))
    torch.testing.assert_close(torch.stack(loss), torch.zeros(6, dtype=x.dtype))


@pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
def test_backends_agree():
    losses = []
    for backend in ("native", "reference"):
        model, x = build(backend), patterns(B, T)
        torch.manual_seed(3)
        losses.append(model.loss(x))
    torch.testing.assert_close(*losses)


def test_cues_are_what_the_weights_are_inferred_from():
    model, x = build(), patterns(B, T)
    torch.manual_seed(3)
    plain = model.loss(x)
    torch.manual_seed(3)
    same = model.loss(x, cues=x)
    torch.manual_seed(3)
    other = model.loss(x, cues=x.flip(1))
    torch.testing.assert_close(plain, same)
    torch.testing.assert_close((plain.kl_memory, plain.autoencoder), (other.kl_memory, other.autoencoder))
    assert other.reconstruction > plain.reconstruction


@pytest.mark.parametrize("cues", ["the pattern", "another pattern"])
def test_the_conditional_bound_is_a_bound(cues):
    """``x = A Mᵀ w + b + noise`` with w ~ N(0, I) is Gaussian given M: its likelihood is known exactly."""
    model, x = build(), patterns(B, T)
    state, samples = model.write(x).state, 4000
    loading = state.mean @ model.decoder.linear.weight.mT  # [B, K, pixels]
    exact = MultivariateNormal(model.decoder.linear.bias, loading.mT @ loading + torch.eye(PIXELS, dtype=x.dtype))
    likelihood = torch.stack([exact.log_prob(x[:, t].flatten(1)) for t in range(T)], 1).mean(1)  # [B]
    if cues == "the pattern":
        nats = torch.stack([model.conditional_bound(x) for _ in range(samples // 4)])
        assert model.conditional_bound(x, 3).shape == (B,)
    else:  # what loss() does with cues, through its parts, averaged over the episodes
        with torch.no_grad():
            parts = [model.loss(x, cues=x.flip(1)) for _ in range(samples // 4)]
        nats = torch.stack([loss.reconstruction + loss.kl_weights for loss in parts])
        likelihood = likelihood.mean()
    error = nats.std(0) / math.sqrt(len(nats))
    assert (nats.mean(0) >= -likelihood - 4 * error).all()
    assert (error < 0.05 * nats.mean(0)).all(), "the samples can tell"


def test_one_iteration_is_a_reconstruction():
    model, x = build(), patterns(B, T)
    state = model.write(x).state
    read = model.attractor_read(x, 1, state=state)
    values = model.memory.read(model.encode(x), state).values
    torch.testing.assert_close(read.patterns, model.decoder.linear(values).unflatten(2, SHAPE))
    torch.testing.assert_close(model.reconstruct(x, state=state), read.patterns)
    assert not read.patterns.requires_grad


def test_iterations_are_reads_of_what_was_read():
    model, x = build(), patterns(B, T)
    state = model.write(x).state
    read, cue = model.attractor_read(x, 4, state=state), x
    for i in range(4):
        step = model.attractor_read(cue, 1, state=state)
        torch.testing.assert_close(step.energy[..., 0], read.energy[..., i])
        cue = step.patterns  # the mode of a Gaussian is its mean
    torch.testing.assert_close(cue, read.patterns)
    torch.testing.assert_close(step.weights, read.weights)
    assert (read.num_iters == 4).all()


def test_energy_is_the_equation():
    model, x = build(), patterns(B, T)
    state = model.write(x).state
    read = model.attractor_read(x, 1, state=state)
    decoded = model.decoder.linear(read.weights @ state.mean)
    nats = -Normal(decoded, 1.0).log_prob(x.flatten(2)).sum(-1)
    torch.testing.assert_close(read.energy[..., 0], nats + model.memory.kl_weights(read.weights))


def test_the_energy_never_rises():
    """A step that would raise it is not taken, and the query rests where it is."""
    model, x = build(), patterns(B, T)
    model.encoder = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 30), nn.Tanh(), nn.Linear(30, C)).double()
    with torch.no_grad():
        model.encoder[-1].weight.mul_(20)  # far from what the decoder undoes
    state, n = model.write(x).state, 5
    read = model.attractor_read(x, n, state=state)
    assert (read.energy.diff(dim=-1) <= 0).all()
    cue, energy, resting = x, x.new_full((B, T), torch.inf), torch.zeros(B, T, dtype=torch.bool)
    for i in range(n):
        step = model.attractor_read(cue, 1, state=state)
        resting = resting | (step.energy[..., 0] > energy)
        energy = torch.where(resting, energy, step.energy[..., 0])
        cue = torch.where(resting[..., None, None], cue, step.patterns)
        torch.testing.assert_close(read.energy[..., i], energy)
    torch.testing.assert_close(read.patterns, cue)
    assert resting.any(), "the encoder does get it wrong"
    assert (read.num_iters < n).equal(resting)


def test_a_step_that_leaves_the_energy_as_it_is_is_taken():
    """A decoder that answers the same to every code, and cues that are its answer: nothing moves at all."""
    model, n = build(), 4
    with torch.no_grad():
        model.decoder.linear.weight.zero_()
    x = model.decoder.linear.bias.detach().view(1, 1, *SHAPE).expand(B, T, *SHAPE)
    state = model.write(patterns(B, T)).state
    read = model.attractor_read(x, n, state=state)
    assert (read.energy == read.energy[..., :1]).all()
    assert (read.num_iters == n).all()
    assert (model.attractor_read(x, n, 0.0, state=state).num_iters == 2).all(), "but with a tolerance it has arrived"


def test_a_query_stops_alone():
    model, x = build(), patterns(B, T)
    state = model.write(x).state
    moves = [
        (model.attractor_read(x, n + 1, state=state).patterns - model.attractor_read(x, n, state=state).patterns)
        .flatten(2).square().mean(-1).sqrt()
        for n in range(1, 6)
    ]  # fmt: skip
    tol = moves[2].median().item()
    read = model.attractor_read(x, 6, tol, state=state)
    below = torch.stack(moves, -1) <= tol  # [B, T, 5]
    wanted = torch.where(below.any(-1), below.int().argmax(-1) + 2, 6)
    assert read.num_iters.equal(wanted)
    assert len(wanted.unique()) > 1, "some stop before others"
    for n in wanted.unique().tolist():
        there = wanted == n
        torch.testing.assert_close(read.patterns[there], model.attractor_read(x, n, state=state).patterns[there])
        assert (read.energy[there][:, n - 1 :] == read.energy[there][:, n - 1 : n]).all()


def test_an_episode_alone_is_as_in_the_batch():
    model, x = build(), patterns(B, T)
    state = model.write(x).state
    alone = model.attractor_read(x[1:2], 3, state=fastkm.MemoryState(state.mean[1:2], state.cov[1:2]))
    together = model.attractor_read(x, 3, state=state)
    for one, all_of_them in zip(alone, together, strict=True):
        torch.testing.assert_close(one[0], all_of_them[1])


def test_generate_decodes_the_prior_and_then_reads():
    model, x = build(), patterns(B, T)
    state = model.write(x).state
    torch.manual_seed(5)
    first = model.generate(7, state=state)
    torch.manual_seed(5)
    weights = model.memory.sample_prior_weights(B, 7)
    torch.testing.assert_close(first, model.decoder.linear(weights @ state.mean).unflatten(2, SHAPE))
    torch.manual_seed(5)
    third = model.generate(7, 3, state=state)
    torch.testing.assert_close(third, model.attractor_read(first, 2, state=state).patterns)


def test_convolutional_pair():
    torch.manual_seed(0)
    model = DynamicKanervaMachine(ConvEncoder(9, 4), ConvDecoder(9, 4), KanervaMemory(9, 4))
    x = (torch.rand(2, 3, 1, 28, 28) < 0.2).float()
    model.loss(x).total.backward()
    state = model.write(x).state
    read = model.attractor_read(x, 3, state=state)
    assert read.patterns.shape == x.shape
    assert ((read.patterns >= 0) & (read.patterns <= 1)).all()
    assert read.energy.shape == (2, 3, 3)
    grey = 0.3 * x + 0.2
    decoded = model.decode(model.encode(x))
    mixed = 0.5 * (decoded.log_prob(torch.ones(6, 1, 28, 28)) + decoded.log_prob(torch.zeros(6, 1, 28, 28)))
    torch.testing.assert_close(decoded.log_prob(torch.full((6, 1, 28, 28), 0.5)), mixed)
    assert model.attractor_read(grey, 2, state=state).energy.isfinite().all()


def test_no_queries_and_no_episodes():
    model, x = build(), patterns(B, T)
    state = model.write(x).state
    read = model.attractor_read(x[:, :0], 3, state=state)
    assert [tuple(y.shape) for y in read] == [(B, 0, *SHAPE), (B, 0, K), (B, 0, 3), (B, 0)]
    none = fastkm.MemoryState(state.mean[:0], state.cov[:0])
    assert model.attractor_read(x[:0], 3, state=none).patterns.shape == (0, T, *SHAPE)
    assert model.conditional_bound(x[:0]).shape == (0,)


def test_pixels_at_a_tie_stay_numbers():
    model = DynamicKanervaMachine(ConvEncoder(9, 4), ConvDecoder(9, 4), KanervaMemory(9, 4))
    for parameter in model.decoder.parameters():
        nn.init.zeros_(parameter)  # every pixel is on with probability one half
    x = torch.rand(1, 2, 1, 28, 28)
    state = model.write(x).state
    assert model.attractor_read(x, 3, state=state).energy.isfinite().all()
    tie = torch.full_like(x, 0.5)  # what is read next: the mean of the pixel, and so it stays
    assert (model.attractor_read(tie, 3, state=state).num_iters == 3).all()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m, x: DynamicKanervaMachine(m.encoder, m.decoder, nn.Linear(2, 2)), TypeError, "memory must be a Kan"),
        (lambda m, x: m.loss(x.tolist()), TypeError, "patterns must be a tensor"),
        (lambda m, x: m.loss(x[0, :, 0, 0]), ValueError, "shape [B, T, *pattern], got"),
        (lambda m, x: m.loss(x > 0), ValueError, "must be floating point"),
        (lambda m, x: m.loss(x, cues=x[:, :2]), ValueError, "cues must have the shape of episode, [3, 5, 2, 4], got"),
        (lambda m, x: m.loss(x, num_reads=0), ValueError, "num_reads must be at least 1"),
        (lambda m, x: m.attractor_read(x, 0, state=m.write(x).state), ValueError, "num_iters must be at least 1"),
        (lambda m, x: m.attractor_read(x, 2, -1.0, state=m.write(x).state), ValueError, "tol must be"),
        (lambda m, x: m.generate(0, state=m.write(x).state), ValueError, "num_samples must be at least 1"),
        (lambda m, x: DynamicKanervaMachine(LinearEncoder(C + 1).double(), m.decoder, m.memory).write(x), ValueError,
         "encoder must return codes [B T, C] = [15, 6], got [15, 7]"),
        (lambda m, x: DynamicKanervaMachine(m.encoder, nn.Identity(), m.memory).loss(x), TypeError, "decoder must ret"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error) as caught:
        call(build(), patterns(B, T))
    assert words in str(caught.value)
