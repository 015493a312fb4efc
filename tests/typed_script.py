"""A user's script with every public function and result field: type-checked and run against an installed wheel."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import assert_type

import fastkm
from fastkm import models

state = fastkm.MemoryState(torch.randn(2, 4, 3), torch.eye(4).repeat(2, 1, 1))
values, weights, queries = torch.randn(2, 5, 3), torch.randn(2, 5, 4), torch.randn(2, 6, 3)
mask = torch.ones(2, 5, dtype=torch.bool)

# ---- functions -----------------------------------------------------------------------------------------------------

assert_type(state.mean, Tensor)
assert_type(state.cov, Tensor)

update = fastkm.update_posterior(state, weights, values, 0.5, mask=mask, precision="ieee", backend="reference")
assert_type(update, fastkm.PosteriorUpdate)
assert_type(update.state, fastkm.MemoryState)
assert_type(update.innovation_var, Tensor)
assert_type(update.kl, Tensor)
assert_type(update.log_evidence, Tensor)

removed = fastkm.remove_patterns(update.state, weights, values, 0.5, mask=mask, backend="reference")
assert_type(removed, fastkm.MemoryState)
replaced = fastkm.replace_patterns(update.state, weights, values, weights, -values, 0.5, old_noise_var=0.5, mask=mask)
assert_type(replaced, fastkm.MemoryState)

sums = fastkm.update_information(fastkm.to_information(state), weights, values, 0.5, mask=mask)
assert_type(sums, fastkm.InformationState)
assert_type(sums.precision, Tensor)
assert_type(sums.information, Tensor)
assert_type(fastkm.from_information(sums, dtype=torch.float32), fastkm.MemoryState)
assert_type(fastkm.merge_memories([update.state], state), fastkm.MemoryState)

root = fastkm.update_square_root(fastkm.to_square_root(state), weights, values, 1e-10, mask=mask, backend="reference")
assert_type(root, fastkm.SquareRootState)
assert_type(root.mean, Tensor)
assert_type(root.root, Tensor)
assert_type(fastkm.from_square_root(root), fastkm.MemoryState)

written = fastkm.write(state, values, torch.ones(2, 5), torch.ones(2), num_opt_iters=1, method="ridge", mask=mask)
assert_type(written, fastkm.WriteResult)
assert_type(written.state, fastkm.MemoryState)
assert_type(written.weights, Tensor)
assert_type(written.innovation_var, Tensor)
assert_type(written.kl, Tensor)

read = fastkm.read(written.state.mean, queries, 1.0, num_iters=2)
assert_type(read, fastkm.ReadResult)
assert_type(read.values, Tensor)
assert_type(read.weights, Tensor)


def clean(codes: Tensor) -> Tensor:
    return codes.tanh()


attracted = fastkm.attractor_read(written.state, queries, 1.0, 1.0, clean=clean, num_iters=3, weight_var=0.1, tol=1e-3)
assert_type(attracted, fastkm.AttractorResult)
assert_type(attracted.values, Tensor)
assert_type(attracted.weights, Tensor)
assert_type(attracted.energy, Tensor)
assert_type(attracted.num_iters, Tensor)

factor = fastkm.factor_addressing(written.state.mean, 1.0, method="ridge")
assert_type(factor, fastkm.AddressingFactor)
assert_type(factor.mean, Tensor)
assert_type(factor.ridge, Tensor)
assert_type(factor.lower, Tensor)
assert_type(factor.pseudoinverse, Tensor)
assert_type(factor.gram, Tensor)
assert_type(fastkm.read_factored(factor, queries, num_iters=2), fastkm.ReadResult)
assert_type(fastkm.solve_factored(factor, queries), Tensor)

filtered = fastkm.filter_posterior(state, weights, values, weights, 0.5, retention=0.9, read="after", mask=mask)
assert_type(filtered, fastkm.FilterResult)
assert_type(filtered.state, fastkm.MemoryState)
assert_type(filtered.values, Tensor)
assert_type(filtered.variance, Tensor)
assert_type(filtered.innovation_var, Tensor)
assert_type(filtered.log_evidence, Tensor)

stream = fastkm.MemoryStream(state, 0.5, 1.0)
stream_written = stream.write(values)
stream.replace(stream_written.weights, values, stream_written.weights, -values)
stream.remove(stream_written.weights, -values)
assert_type(stream_written, fastkm.StreamWrite)
assert_type(stream_written.weights, Tensor)
assert_type(stream_written.innovation_var, Tensor)
assert_type(stream_written.kl, Tensor)
stream_updated = stream.update(weights, values)
assert_type(stream_updated, fastkm.StreamUpdate)
assert_type(stream_updated.innovation_var, Tensor)
assert_type(stream_updated.kl, Tensor)
assert_type(stream_updated.log_evidence, Tensor)
assert_type(stream.read(queries), fastkm.ReadResult)
assert_type(stream.state, fastkm.MemoryState)

assert_type(fastkm.solve_addressing(state.mean, queries, 1.0), Tensor)
assert_type(fastkm.kl_memory(written.state, state, method="exact"), Tensor)
assert_type(fastkm.kl_weights(read.weights, 0.1, 1.0), Tensor)
assert_type(fastkm.logdet(written.state.cov), Tensor)
assert_type(fastkm.__version__, str)
fastkm.explain_backend("write", values)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "memory.safetensors"
    try:
        fastkm.save_memory_state(written.state, path)
    except ImportError:
        print("safetensors is not installed")
    else:
        assert_type(fastkm.load_memory_state(path), fastkm.MemoryState)
        fastkm.save_memory_state(root, path)
        assert_type(fastkm.load_memory_state(path, form=fastkm.SquareRootState), fastkm.SquareRootState)

try:
    fastkm.read(state.mean.to(torch.float16), queries, 1.0, backend="native")
except (fastkm.BackendUnavailableError, TypeError) as error:
    print(error)

# ---- distributions -------------------------------------------------------------------------------------------------

distribution = fastkm.MatrixNormal(written.state.mean, written.state.cov)
assert_type(distribution.mean, Tensor)
assert_type(distribution.mode, Tensor)
assert_type(distribution.variance, Tensor)
assert_type(distribution.rsample(), Tensor)
assert_type(distribution.log_prob(state.mean), Tensor)
assert_type(distribution.entropy(), Tensor)

covariance = fastkm.KroneckerCovariance(written.state.cov)
assert_type(covariance.matvec(state.mean), Tensor)
assert_type(covariance.solve(state.mean), Tensor)
assert_type(covariance.color(state.mean), Tensor)
assert_type(covariance.whiten(state.mean), Tensor)
assert_type(covariance.quadratic_form(state.mean), Tensor)
assert_type(covariance.logdet(3), Tensor)

# ---- modules -------------------------------------------------------------------------------------------------------

memory = fastkm.KanervaMemory(3, 4, learn_obs_noise=True)
prior = memory.prior_state(2)
assert_type(prior, fastkm.MemoryState)
assert_type(memory.noise_var, Tensor)
assert_type(memory.ridge, Tensor)
assert_type(memory.weight_var, Tensor)
kept = memory.write(values, prior, mask)
assert_type(kept, fastkm.WriteResult)
assert_type(memory.read(queries, kept.state), fastkm.ReadResult)
assert_type(memory.attractor_read(queries, kept.state, clean=clean, num_iters=2), fastkm.AttractorResult)
assert_type(memory.kl(kept.state), Tensor)
assert_type(memory.kl_weights(kept.weights), Tensor)
assert_type(memory.sample_prior_weights(2, 5), Tensor)
assert_type(memory.generate(kept.state, 3, clean=clean, num_iters=2), Tensor)

model = models.DynamicKanervaMachine(models.ConvEncoder(8, 2), models.ConvDecoder(8, 2), fastkm.KanervaMemory(8, 4))
episode = (torch.rand(2, 5, 1, 28, 28) < 0.3).float()
loss = model.loss(episode, num_reads=2)
assert_type(loss, models.EpisodeLoss)
assert_type(loss.total, Tensor)
assert_type(loss.reconstruction, Tensor)
assert_type(loss.kl_weights, Tensor)
assert_type(loss.kl_memory, Tensor)
assert_type(loss.autoencoder, Tensor)
assert_type(loss.cleanup, Tensor)
held = model.write(episode).state
assert_type(model.encode(episode), Tensor)
assert_type(model.reconstruct(episode, state=held), Tensor)
assert_type(model.generate(3, 2, state=held), Tensor)
assert_type(model.conditional_bound(episode), Tensor)
cleaned = model.attractor_read(episode, 2, state=held)
assert_type(cleaned, models.PatternRead)
assert_type(cleaned.patterns, Tensor)
assert_type(cleaned.weights, Tensor)
assert_type(cleaned.energy, Tensor)
assert_type(cleaned.num_iters, Tensor)
