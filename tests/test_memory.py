"""KanervaMemory: the functions it wraps, its gradients, its samples, and its life on disk."""

import math
from functools import partial

import pytest
import torch

import fastkm
from fastkm import KanervaMemory, MemoryState
from fastkm._runtime import schema

B, T, Q, K, C = 3, 5, 4, 6, 7
PARAMETERS = {"prior_mean", "prior_log_var", "log_weight_stddev", "log_noise_stddev"}


def memory(**options) -> KanervaMemory:
    module = KanervaMemory(C, K, **options).double()
    module.reset_parameters()  # the constants of the constructor in float64
    return module


def written(module: KanervaMemory, batch: int = B) -> MemoryState:
    with torch.no_grad():
        return module.write(torch.randn(batch, T, C, dtype=module.prior_mean.dtype)).state


def queries(*, dtype=torch.float64):
    return torch.randn(B, Q, C, dtype=dtype)


def test_prior_is_what_the_parameters_say():
    module = memory()
    with torch.no_grad():
        module.prior_log_var.fill_(math.log(2.5))
    state = module.prior_state(B)
    assert (state.mean == module.prior_mean).all()
    torch.testing.assert_close(state.cov, 2.5 * torch.eye(K).double().expand(B, K, K), rtol=1e-15, atol=0)
    assert module.prior_mean.abs().min() > 0, "from a zero mean nothing can be written"
    torch.testing.assert_close(module.kl(state), torch.zeros(B).double(), rtol=0, atol=K * C * 1e-15)


def test_prior_state_shares_no_memory_with_the_parameters():
    module = memory()
    before = module.prior_mean.clone()
    with torch.no_grad():
        module.prior_state(1).mean.zero_()
    assert torch.equal(module.prior_mean, before)


@pytest.mark.parametrize("learn_obs_noise", [False, True])
def test_methods_equal_the_functions_they_wrap(learn_obs_noise):
    module = memory(w_prior_stddev=0.5, obs_noise_stddev=0.2, learn_obs_noise=learn_obs_noise, num_opt_iters=2)
    noise_var, ridge = 0.2**2, 0.4**2
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    values, mask = torch.randn(B, T, C).double(), torch.rand(B, T) > 0.3
    prior = module.prior_state(B)

    result = module.write(values, mask=mask)
    close(result, fastkm.write(prior, values, noise_var, ridge, num_opt_iters=2, mask=mask, backend="reference"))
    state = result.state
    close(module.write(values, state), fastkm.write(state, values, noise_var, ridge, num_opt_iters=2))
    cues = queries()
    close(module.read(cues, state, num_iters=3), fastkm.read(state.mean, cues, ridge, num_iters=3))
    close(
        module.attractor_read(cues, state, clean=torch.tanh, num_iters=3, tol=0.01),
        fastkm.attractor_read(
            state, cues, noise_var, ridge, clean=torch.tanh, num_iters=3, tol=0.01, weight_var=0.3**2
        ),
    )
    close(module.kl(state), fastkm.kl_memory(state, prior))
    weights = module.read(cues, state).weights
    close(module.kl_weights(weights), fastkm.kl_weights(weights, 0.3**2, 0.25))


def test_empty_batches_and_episodes():
    module = memory()
    assert module.write(torch.zeros(0, T, C).double()).state.mean.shape == (0, K, C)
    result = module.write(torch.zeros(B, 0, C).double())
    assert result.weights.shape == (B, 0, K)
    torch.testing.assert_close(result.state, module.prior_state(B))
    assert module.generate(result.state, 0).shape == (B, 0, C)


class Objective(torch.nn.Module):
    """The negative objective of an episode, in nats: reconstruction, KL of the weights, KL of the memory."""

    def __init__(self, **options):
        super().__init__()
        self.memory = KanervaMemory(3, 2, learn_obs_noise=True, **options).double()

    def forward(self, values):
        torch.manual_seed(1)  # the same draws every time, so that it is a function
        state = self.memory.write(values).state
        read = self.memory.read(values, state)
        noise_var = self.memory.noise_var
        missed = 0.5 * ((values - read.values).square() / noise_var + (2 * math.pi * noise_var).log()).sum()
        return missed + self.memory.kl_weights(read.weights).sum() + self.memory.kl(state).sum()


@pytest.mark.parametrize("sample_w", [False, True])
@pytest.mark.parametrize("sample_memory", [False, True])
def test_gradients_reach_every_parameter_and_are_right(sample_w, sample_memory):
    objective = Objective(sample_w=sample_w, sample_memory=sample_memory)
    values = torch.randn(2, 3, 3).double()
    names, parameters = zip(*objective.named_parameters(), strict=True)
    assert {name.removeprefix("memory.") for name in names} == PARAMETERS

    def loss(*parameters):
        return torch.func.functional_call(objective, dict(zip(names, parameters, strict=True)), (values,))

    assert torch.autograd.gradcheck(loss, parameters)
    objective(values).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in parameters)


def test_noise_is_a_parameter_only_if_learned():
    assert {name for name, _ in memory().named_parameters()} == PARAMETERS - {"log_noise_stddev"}
    assert set(memory().state_dict()) == set(memory(learn_obs_noise=True).state_dict()) == PARAMETERS


def test_gradients_reach_weight_stddev_through_the_sample_alone():
    module = memory(sample_w=True)
    module.read(queries(), written(module)).values.sum().backward()
    assert module.log_weight_stddev.grad.abs() > 0


def test_state_dict_round_trip(tmp_path):
    module = memory(obs_noise_stddev=0.2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    torch.save(module.state_dict(), tmp_path / "memory.pt")
    other = memory()
    other.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    values = torch.randn(B, T, C).double()
    torch.testing.assert_close(other.write(values), module.write(values), rtol=0, atol=0)
    assert torch.equal(other.noise_var, module.noise_var)


def test_state_through_safetensors(tmp_path, dtype):
    pytest.importorskip("safetensors")
    module = KanervaMemory(C, K).to(dtype)
    state = written(module)
    fastkm.save_memory_state(state, tmp_path / "state.safetensors")
    loaded = fastkm.load_memory_state(tmp_path / "state.safetensors")
    assert loaded.mean.dtype == dtype
    cues = queries(dtype=dtype)
    torch.testing.assert_close(module.read(cues, loaded), module.read(cues, state), rtol=0, atol=0)
    # the prior, too: its mean is a parameter
    fastkm.save_memory_state(module.prior_state(B), tmp_path / "prior.safetensors")
    assert torch.equal(fastkm.load_memory_state(tmp_path / "prior.safetensors").mean[-1], module.prior_mean)


def test_cast_and_move():
    module = KanervaMemory(C, K)
    assert written(module).mean.dtype == torch.float32
    assert written(module.double()).cov.dtype == torch.float64
    assert module.noise_var.dtype == torch.float64  # the buffer goes along
    module = module.to("meta")
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    assert module.prior_state(B).cov.device.type == "meta"
    assert module.sample_prior_weights(2).device.type == "meta"


def test_reset_parameters_draws_anew():
    module = memory(obs_noise_stddev=0.5, learn_obs_noise=True)
    before = module.prior_mean.clone()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(9.0)
    module.reset_parameters()
    assert not torch.equal(module.prior_mean, before)
    found = [module.prior_state(1).cov[0, 0, 0], module.weight_var, module.noise_var]
    torch.testing.assert_close(
        torch.stack(found), torch.tensor([1, 0.09, 0.25], dtype=torch.float64), rtol=1e-14, atol=0
    )


# --- samples -------------------------------------------------------------------------------------


def assert_moments(samples: torch.Tensor, mean: torch.Tensor, cov: torch.Tensor, sigmas: float = 5.0) -> None:
    """``samples [N, D]`` of a Gaussian have this mean and covariance, up to five standard errors."""
    n, var = samples.shape[0], cov.diagonal()
    assert ((samples.mean(0) - mean).abs() <= sigmas * (var / n).sqrt()).all()
    centred = samples - mean
    found = centred.mT @ centred / n
    assert ((found - cov).abs() <= sigmas * ((cov.square() + var.outer(var)) / n).sqrt()).all()


N = 20_000


@torch.no_grad()
def test_sampled_weights_have_the_moments_of_q_w():
    module = memory(sample_w=True)
    state = written(module, 1)
    cue = queries()[:1, :1]
    values, weights = module.read(cue.expand(1, N, C), state)
    mean = fastkm.read(state.mean, cue, module.ridge)
    torch.testing.assert_close(weights, mean.weights.expand_as(weights))  # μ, whatever was sampled
    assert_moments(values[0], mean.values[0, 0], 0.3**2 * state.mean[0].mT @ state.mean[0])


@torch.no_grad()
def test_one_memory_is_sampled_per_read():
    """Every query of a read sees the same M: z = Mᵀw exactly, for the M that any K of the queries determine."""
    module = memory(sample_memory=True)
    state = written(module)
    values, weights = module.read(torch.randn(B, 3 * K, C).double(), state)
    normal = weights[:, :K].mT @ weights[:, :K]
    sampled = torch.cholesky_solve(weights[:, :K].mT @ values[:, :K], torch.linalg.cholesky(normal))
    torch.testing.assert_close(weights @ sampled, values, rtol=1e-6, atol=1e-6)
    assert (sampled - state.mean).abs().max() > 0.01
    assert not torch.equal(module.read(values, state).values, module.read(values, state).values)


@torch.no_grad()
def test_sampled_weights_decode_the_sampled_memory():
    """With both options a read decodes the M it addressed: here with weights that have next to no variance."""
    module = memory(sample_w=True, sample_memory=True)
    state = written(module)
    module.log_weight_stddev.fill_(-30)
    values, weights = module.read(torch.randn(B, 3 * K, C).double(), state)
    normal = weights[:, :K].mT @ weights[:, :K]
    sampled = torch.cholesky_solve(weights[:, :K].mT @ values[:, :K], torch.linalg.cholesky(normal))
    torch.testing.assert_close(weights @ sampled, values, rtol=1e-6, atol=1e-6)
    assert (sampled - state.mean).abs().max() > 0.01


@torch.no_grad()
def test_generated_codes_have_the_moments_of_the_model():
    """z = Mᵀw, w ~ N(0, σ0²I): mean 0 and covariance σ0² RᵀR for a fixed memory."""
    module = memory(w_prior_stddev=0.7)
    state = written(module, 1)
    codes = module.generate(state, N)
    assert codes.shape == (1, N, C)
    assert_moments(codes[0], torch.zeros(C).double(), 0.7**2 * state.mean[0].mT @ state.mean[0])
    assert_moments(module.sample_prior_weights(N), torch.zeros(K).double(), 0.7**2 * torch.eye(K).double())
    assert module.sample_prior_weights(2, 3).shape == (2, 3, K)


@torch.no_grad()
def test_sampled_memories_have_the_moments_of_q_m():
    """M recovered from single-cue reads of N equal memories: mean R and row covariance U, column by column."""
    module = memory(sample_memory=True)
    state = written(module, 1)
    many = MemoryState(state.mean.expand(N, K, C), state.cov.expand(N, K, K))
    sampled = module._memory(many)
    for column in (0, C - 1):
        assert_moments(sampled[:, :, column], state.mean[0, :, column], state.cov[0])
    assert_moments(sampled[:, 0, :2], state.mean[0, 0, :2], state.cov[0, 0, 0] * torch.eye(2).double())


@pytest.mark.parametrize("sample_w", [False, True])
@pytest.mark.parametrize("sample_memory", [False, True])
def test_flags_keep_the_return_type_and_seeds_reproduce(sample_w, sample_memory):
    module = memory(sample_w=sample_w, sample_memory=sample_memory)
    state, cues = written(module), queries()

    def everything():
        torch.manual_seed(7)
        read = module.read(cues, state, num_iters=2)
        return read, module.generate(state, Q, clean=torch.tanh, num_iters=3), module.sample_prior_weights(2)

    read, codes, weights = everything()
    assert isinstance(read, fastkm.ReadResult)
    assert (read.values.shape, read.weights.shape) == ((B, Q, C), (B, Q, K))
    assert codes.shape == (B, Q, C)
    torch.testing.assert_close(everything(), (read, codes, weights), rtol=0, atol=0)


@torch.no_grad()
def test_generate_iterates_reads_with_and_without_a_codec():
    module = memory()
    state = written(module)

    def seeded(**options):
        torch.manual_seed(3)
        return module.generate(state, Q, **options)

    first = seeded()
    torch.testing.assert_close(seeded(num_iters=3), module.read(first, state, num_iters=2).values)
    code = first
    for _ in range(2):
        code = module.read(torch.tanh(code), state).values
    torch.testing.assert_close(seeded(num_iters=3, clean=torch.tanh), code)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"code_size": 0}, ValueError, "code_size must be at least 1, got 0"),
        ({"memory_size": 2.0}, TypeError, "memory_size must be an int, got float"),
        ({"num_opt_iters": 0}, ValueError, "num_opt_iters must be at least 1"),
        ({"w_prior_stddev": 0.0}, ValueError, "w_prior_stddev must be positive, got 0.0"),
        ({"obs_noise_stddev": -1.0}, ValueError, "obs_noise_stddev must be"),
        ({"obs_noise_stddev": math.nan}, ValueError, "obs_noise_stddev must be"),
        ({"w_prior_stddev": "one"}, TypeError, "w_prior_stddev must be a float, got str"),
        ({"backend": "fast"}, ValueError, "backend must be one of 'native', 'triton', 'reference', got 'fast'"),
    ],
)
def test_bad_constructor_arguments(options, error, words):
    with pytest.raises(error, match=words):
        KanervaMemory(**{"code_size": C, "memory_size": K, **options})


def test_bad_inputs_name_the_argument():
    module = memory()
    state = written(module)
    with pytest.raises(ValueError, match=r"values must have shape \[B, T, C\] = \[3, 5, 7\], got \[3, 5, 8\]"):
        module.write(torch.zeros(B, T, C + 1).double())
    with pytest.raises(TypeError, match="batch_size must be an int"):
        module.prior_state(2.0)
    with pytest.raises(TypeError, match=r"float64 like state\.mean, got float32"):
        module.write(torch.zeros(B, T, C), state)
    wide = MemoryState(torch.zeros(B, K + 1, C).double(), torch.eye(K + 1).double().expand(B, -1, -1))
    for call in (lambda: module.read(queries(), wide), lambda: module.generate(wide, 2)):
        with pytest.raises(ValueError, match=r"state\.mean must have shape \[B, K, C\] = \[3, 6, 7\]"):
            call()
    indefinite = MemoryState(state.mean, state.cov - 10 * torch.eye(K))
    with pytest.raises(torch.linalg.LinAlgError, match=r"row_cov is not positive definite .* \[0, 1, 2\]"):
        memory(sample_memory=True).read(queries(), indefinite)


def test_a_named_backend_that_cannot_run_raises(monkeypatch):
    monkeypatch.setattr(schema, "unavailable", "the C++ extension was not built")
    module = memory(backend="native")
    with pytest.raises(fastkm.BackendUnavailableError, match="backend='reference'"):
        module.write(torch.randn(B, T, C).double())
    assert "backend='native'" in repr(module)
