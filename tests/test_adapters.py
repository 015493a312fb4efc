"""The adapters: the numbers of the programs they stand for, written out in NumPy, and what they refuse."""

import copy

import numpy as np
import pytest
import torch
from oracle.tolerances import assert_close

import fastkm
from fastkm.adapters import deepmind, larimar

S, Q, B, K, C = 7, 3, 2, 6, 9
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def draw(*shape: int, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def close(got, want, **options) -> None:
    torch.testing.assert_close(got.detach(), torch.tensor(np.asarray(want)), **{**CLOSE, **options})


def entries(module) -> dict:
    return {name: x.clone() for name, x in module.state_dict().items()}


def wave(*shape: int) -> torch.Tensor:
    return torch.tensor(np.sin(1 + 1.7 * np.arange(np.prod(shape)) ** 1.1).reshape(shape))


# ---- dynamic-kanerva-machines ----------------------------------------------------------------------------------------


def kanerva(**options) -> deepmind.KanervaMemory:
    torch.manual_seed(0)
    memory = deepmind.KanervaMemory(C, K, w_prior_stddev=0.8, obs_noise_stddev=0.7, **options).double()
    memory.reset_parameters()
    with torch.no_grad():
        memory.memory.prior_log_var.fill_(0.3)
    return memory


def released_weights(R, z, ridge):
    """Regularised least squares ``min ‖R z − R Rᵀ w‖² + λ‖w‖²``, as matrix_solve_ls solves it."""
    gram = R @ R.T
    return np.linalg.solve(gram.T @ gram + ridge * np.eye(len(R)), gram.T @ (R @ z))


def paper_weights(R, z, ridge):
    return np.linalg.solve(R @ R.T + ridge * np.eye(len(R)), R @ z)


def written_out(solve, R, U, z_episode, noise, ridge, weight_var, prior_weight_var, num_opt_iters=1):
    """One memory: mean, covariance, weights, KL of the weights, KL of each update."""
    rows, columns = R.shape
    weights, dkl_w, dkl_M = [], [], []
    for z in z_episode:
        new = R
        for _ in range(num_opt_iters):
            w = solve(new, z, ridge)
            wU, delta = w @ U, z - w @ R
            var_z = wU @ w + noise
            new = R + np.outer(wU / var_z, delta)
        beta = wU @ w / var_z
        R, U = new, U - np.outer(wU / var_z, wU)
        ratio = weight_var / prior_weight_var
        weights.append(w)
        dkl_w.append(0.5 * (rows * ratio + w @ w / prior_weight_var - rows - rows * np.log(ratio)))
        dkl_M.append(-0.5 * (columns * beta - beta / var_z * delta @ delta + columns * np.log(1 - beta)))
    return R, U, np.array(weights), np.array(dkl_w), np.array(dkl_M)


@pytest.mark.parametrize("num_opt_iters", [1, 3])
@pytest.mark.parametrize(("parity", "solve"), [(True, released_weights), (False, paper_weights)])
def test_an_episode_has_the_numbers_of_the_formulas(parity, solve, num_opt_iters):
    memory, z = kanerva(parity=parity, num_opt_iters=num_opt_iters), draw(S, B, C)
    prior = memory.get_prior_state(B)
    state, *rest = memory.update_state(z, prior)
    for b in range(B):
        R, U = (x[b].detach().numpy() for x in prior)
        want = written_out(solve, R, U, z[:, b].numpy(), 0.49, 0.49 / 0.64, 0.09, 0.64, num_opt_iters)
        for got, x in zip((state.M_mean[b], state.M_cov[b], *(x[:, b] for x in rest)), want, strict=True):
            close(got, x)


@pytest.mark.parametrize(("parity", "solve"), [(True, released_weights), (False, paper_weights)])
def test_a_read_has_the_numbers_of_the_formulas(parity, solve):
    memory, cues = kanerva(parity=parity), draw(Q, B, C, seed=1)
    state = memory.update_state(draw(S, B, C), memory.get_prior_state(B)).final_memory
    z_mean, dkl_w = memory.read_with_z(cues, state)
    for q in range(Q):
        for b in range(B):
            R = state.M_mean[b].detach().numpy()
            w = solve(R, cues[q, b].numpy(), 0.49 / 0.64)
            close(z_mean[q, b], R.T @ w)
            close(dkl_w[q, b], 0.5 * (K * 0.09 / 0.64 + w @ w / 0.64 - K + K * np.log(0.64 / 0.09)))


def test_parity_has_the_numbers_of_the_released_module():
    """They were printed by memory.py of revision 49e7a0d, on stand-ins for TensorFlow and Sonnet made of NumPy."""
    memory = deepmind.KanervaMemory(4, 3, 2, 0.8, 0.7, parity=True).double()
    memory.reset_parameters()
    with torch.no_grad():
        memory.memory.prior_mean.copy_(wave(3, 4))
        memory.memory.prior_log_var.fill_(0.3)
    state, w, dkl_w, dkl_M = memory.update_state(2 * wave(3, 2, 4).flip(0), memory.get_prior_state(2))
    read_z, read_dkl_w = memory.read_with_z(wave(2, 2, 4), state)
    close(state.M_mean[1, 0], [0.489046358895, 0.278820464166, -1.047857561653, 1.365930381729])
    close(state.M_cov[1, 0], [0.346181898585, 0.172791805086, 0.081000021162])
    close(w[2, 1], [0.025409330851, 0.778816586099, -0.855588458423])
    close(dkl_w[:, 1], [3.185844840334, 3.019395088582, 2.699700664554])
    close(dkl_M[:, 1], [2.461821110258, 1.578055612204, 0.288687571056])
    close(read_z[1, 1], [0.776341158130, -0.974600850435, 0.554626143902, 0.163985966822])
    close(read_dkl_w, [[2.052966382515, 1.916026825973], [1.952556257185, 1.969002726611]])
    close(memory.get_dkl_total(state), [5.565821123507, 4.724812451420])


def test_the_divergence_from_the_prior_is_exact_or_that_of_the_released_code():
    for parity in (False, True):
        memory = kanerva(parity=parity)
        prior = memory.get_prior_state(B)
        state = memory.update_state(draw(S, B, C), prior).final_memory
        for b in range(B):
            (R, U), (R0, U0) = ([x[b].detach().numpy() for x in belief] for belief in (state, prior))
            if parity:
                p, q = np.diag(U0), np.diag(U)
                want = C * (q / p).sum() + ((R - R0) ** 2 / p[:, None]).sum() - C * K + C * np.log(p / q).sum()
            else:
                log_ratio = np.linalg.slogdet(U0)[1] - np.linalg.slogdet(U)[1]
                shift = np.trace((R - R0).T @ np.linalg.solve(U0, R - R0))
                want = 0.5 * (C * np.trace(np.linalg.solve(U0, U)) + shift - K * C + C * log_ratio)
            close(memory.get_dkl_total(state)[b], want)


def test_the_prior_is_that_of_the_released_code():
    memory = kanerva()
    state = memory.get_prior_state(B)
    close(state.M_mean, memory.memory.prior_mean.detach().expand(B, K, C))
    close(state.M_cov, (np.exp(0.3) + 1e-6) * np.broadcast_to(np.eye(K), (B, K, K)))
    close(memory.prior_avg_var, np.exp(0.3) + 1e-6)
    assert memory.memory.prior_mean.abs().max() <= 2
    assert memory.memory.log_weight_stddev.item() == pytest.approx(np.log(0.3))


def test_its_state_and_that_of_the_package_have_files_of_their_own(tmp_path):
    """torch.export finds a named tuple by a name, which two of them would share."""

    class Same(torch.nn.Module):
        def forward(self, state):
            return type(state)(*state)

    for kind in (fastkm.MemoryState, deepmind.MemoryState):
        state = kind(torch.ones(1, 2, 3), torch.eye(2).expand(1, 2, 2))
        torch.export.save(torch.export.export(Same(), (state,)), tmp_path / "model.pt2")
        assert type(torch.export.load(tmp_path / "model.pt2").module()(state)) is kind


def test_a_noise_that_is_not_positive_is_learned():
    learned = deepmind.KanervaMemory(C, K, obs_noise_stddev=0.0)
    assert learned.memory.log_noise_stddev.requires_grad
    assert learned.memory.noise_var.item() == 1
    assert not kanerva().memory.log_noise_stddev.requires_grad


def test_without_a_spread_samples_are_means():
    """σw and U near 0 leave nothing to draw, so that the loop over patterns must give what one write gives."""
    plain, sampling = kanerva(), kanerva(sample_w=True, sample_M=True, num_opt_iters=1)
    with torch.no_grad():
        sampling.memory.log_weight_stddev.fill_(-40)
    z, state = draw(S, B, C), plain.get_prior_state(B)
    tight = deepmind.MemoryState(state.M_mean, 1e-24 * state.M_cov)
    want, got = plain.update_state(z, tight), sampling.update_state(z, tight)
    for name in ("M_mean", "M_cov"):
        close(getattr(got.final_memory, name), getattr(want.final_memory, name).detach(), atol=1e-9)
    close(got.w_mean_episode, want.w_mean_episode.detach(), atol=1e-9)
    close(sampling.read_with_z(z, tight)[0], plain.read_with_z(z, tight)[0].detach(), atol=1e-9)


def test_samples_of_weights_have_the_moments_of_their_law():
    memory, n = kanerva(sample_w=True), 40_000
    torch.manual_seed(0)
    weights = memory.sample_w(torch.full((n, 1, K), 2.0, dtype=torch.float64)).detach()
    prior = memory.sample_prior_w(n, 1)
    assert prior.shape == (n, 1, K)
    for sample, mean, stddev in ((weights, 2.0, 0.3), (prior, 0.0, 0.8)):
        n_all = n * K  # six standard errors
        assert abs(sample.mean() - mean) < 6 * stddev / n_all**0.5
        assert abs(sample.std() - stddev) < 6 * stddev / (2 * n_all) ** 0.5


def test_what_is_sampled_is_what_is_read_and_the_mean_is_written():
    memory, plain = kanerva(sample_w=True), kanerva()
    z, prior = draw(S, B, C), plain.get_prior_state(B)
    got, want = memory.update_state(z, prior), plain.update_state(z, prior)
    close(got.final_memory.M_mean, want.final_memory.M_mean.detach())
    close(got.dkl_w_episode, want.dkl_w_episode.detach())
    assert (got.w_mean_episode - want.w_mean_episode).abs().min() > 0
    assert (memory.read_with_z(z, prior)[0] - plain.read_with_z(z, prior)[0]).abs().min() > 0


def test_weights_decode_and_codes_have_a_density():
    memory, w, R = kanerva(), draw(Q, B, K), draw(B, K, C, seed=1)
    close(memory.get_w_to_z_mean(w, R), np.einsum("sbm,bmc->sbc", w.numpy(), R.numpy()))
    z = draw(Q, B, C, seed=2)
    want = -0.5 * ((z.numpy() / 0.7) ** 2).sum(-1) - C * np.log(0.7 * np.sqrt(2 * np.pi))
    close(memory.wrap_z_dist(torch.zeros(Q, B, C).double()).log_prob(z), want)


def test_gradients_reach_every_parameter_through_an_episode():
    memory = kanerva(sample_w=True, sample_M=True)
    update = memory.update_state(draw(S, B, C), memory.get_prior_state(B))
    read_z, dkl_w = memory.read_with_z(draw(Q, B, C), update.final_memory)
    (read_z.square().sum() + dkl_w.sum() + memory.get_dkl_total(update.final_memory).sum()).backward()
    for name in ("prior_mean", "prior_log_var", "log_weight_stddev"):
        assert getattr(memory.memory, name).grad.abs().sum() > 0, name


def test_its_inner_memory_is_a_memory_of_the_package():
    memory = kanerva()
    other = fastkm.KanervaMemory(C, K, w_prior_stddev=0.8, obs_noise_stddev=0.7).double()
    other.load_state_dict(memory.memory.state_dict())
    z = draw(S, B, C)
    state = memory.get_prior_state(B)
    close(memory.update_state(z, state)[0].M_mean, other.write(z.transpose(0, 1), tuple(state)).state.mean.detach())


@pytest.mark.parametrize("z", [draw(S, C), draw(S, B, C + 1), draw(S, B + 1, C)])
def test_codes_of_a_wrong_shape_are_refused(z):
    memory = kanerva()
    state = memory.get_prior_state(B)
    for method in (memory.update_state, memory.read_with_z):
        with pytest.raises(ValueError, match=r"must (have shape|be a tensor)"):
            method(z, state)


# ---- larimar ---------------------------------------------------------------------------------------------------------

LARIMAR = {"memory_mean": [K, C], "memory_logvar": [1], "ben_cohen_memory_init": [1]}
W_LOGVAR = {
    0: {"w_logvar": [1]},
    1: {"w_logvar": [K]},
    2: {"w_logvar.weight": [K, C], "w_logvar.bias": [K]},
    3: {"w_logvar.weight": [K, C * K], "w_logvar.bias": [K]},
    4: {"w_logvar.weight": [K, C + C * K], "w_logvar.bias": [K]},
}
T = 4


def gpm(direct_writing: bool = True, ordering: bool = False, **options) -> larimar.GPM:
    torch.manual_seed(0)
    module = larimar.GPM(C, K, direct_writing, ordering, 15, **options).double()
    with torch.no_grad():
        module.memory_logvar.fill_(0.2)
        for x in module.w_logvar.parameters() if isinstance(module.w_logvar, torch.nn.Linear) else [module.w_logvar]:
            x.copy_(0.1 * torch.randn_like(x))
    return module


def mean_of(module) -> np.ndarray:
    return module.memory_mean.detach().numpy()


@pytest.mark.parametrize("setting", W_LOGVAR)
def test_entries_have_the_names_and_shapes_of_larimar(setting):
    shapes = {name: list(x.shape) for name, x in gpm(w_logvar_setting=setting).state_dict().items()}
    assert shapes == LARIMAR | W_LOGVAR[setting]


def test_an_lstm_orders_an_episode():
    module = gpm(ordering=True).double()
    assert len([name for name in module.state_dict() if name.startswith("lstm_z.")]) == 16
    module = larimar.GPM(8, K, True, True)
    assert module._z_attention(torch.randn(T, B, 8)).shape == (T, B, 8)


def test_the_prior_starts_as_the_identity_or_as_noise():
    assert torch.equal(gpm(identity=True).memory_mean, torch.eye(K, C).double())
    assert gpm().memory_mean.abs().min() > 0
    assert not gpm().memory_logvar.requires_grad


@pytest.mark.parametrize("patterns", [1, T, 3 * K])
@pytest.mark.parametrize("identity", [True, False])
def test_direct_writing_is_the_least_squares_of_its_equations(identity, patterns):
    module, z = gpm(identity=identity), draw(patterns, B, C)
    (mean, cov), _ = module.write_to_memory(z)
    U0 = (np.exp(0.2) + 1e-6) * np.eye(K)
    for b in range(B):
        values = z[:, b].numpy()
        W = values @ np.linalg.pinv(mean_of(module))
        close(mean[b], np.linalg.pinv(W) @ values, rtol=1e-8, atol=1e-8)
        noise_var = np.finfo(float).eps ** 0.5 * np.einsum("ti,ij,tj->t", W, U0, W).max()
        gain = np.linalg.solve(W @ U0 @ W.T + noise_var * np.eye(patterns), W @ U0)
        close(cov[b], U0 - U0 @ W.T @ gain, rtol=0, atol=1e-7)  # rounding over √ε


def test_pseudo_inverses_by_steps_end_where_the_solves_are():
    equations = pytest.importorskip("benchmarks.larimar", reason="needs the source tree").Equations
    module, z = gpm(identity=True, deterministic=True), draw(T, B, C)
    by_steps = equations(module.memory_mean.detach(), steps=30)
    state = module.write_to_memory(z)[0]
    memory = by_steps.write(z)
    close(state.mean, memory, rtol=1e-8, atol=1e-8)
    cues = draw(Q, B, C, seed=1)
    close(module.read_with_encoded_input(cues, state)[0], by_steps.read(cues, memory), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("direct", [True, False])
def test_parity_has_the_numbers_of_larimars_module(direct):
    """They were printed by memory.py of revision 6044174 on a CPU in float64, with 60 steps in each pseudo-inverse."""
    module = larimar.GPM(4, 3, direct, False, 60, 0 if direct else 0.7, deterministic=True, parity=True).double()
    entries = {"memory_mean": wave(3, 4), "memory_logvar": [0.3], "ben_cohen_memory_init": [-5], "w_logvar": [-0.5]}
    module.load_state_dict({name: torch.as_tensor(x, dtype=torch.float64) for name, x in entries.items()})
    (mean, cov), dkl_M = module.write_to_memory(2 * wave(2, 2, 4).flip(0))
    if not direct:
        close(mean[1, 0], [0.862482502843, 0.547714474380, -1.022750407063, 0.270106073500])
        close(cov[1, 0], [1.231203802522, 0.101304783323, -0.040281273260])
        close(dkl_M, 3.274795950998)
        return
    z, dkl_w = module.read_with_encoded_input(wave(2, 2, 4), (mean, cov))
    close(mean[1, 0], [-0.155318564634, 0.232105148442, -0.135940699034, -0.050757692954])
    close(dkl_M, 1.418547028490)
    close(z[1, 1], [0.899978965512, -0.960148818373, 0.541149351067, 0.126186600019])
    close(dkl_w, [[0.659795989569, 0.659795989569], [0.659795989569, 10.576674837244]], rtol=1e-8)  # nearly parallel


def test_sequential_writing_is_the_loop_of_its_equations():
    module, z = gpm(direct_writing=False, observation_noise_std=0.3), draw(T, B, C)
    (mean, cov), _ = module.write_to_memory(z)
    for b in range(B):
        U0 = (np.exp(0.2) + 1e-6) * np.eye(K)
        R, U, *_ = written_out(paper_weights, mean_of(module), U0, z[:, b].numpy(), 0.09, 0.09, 1.0, 1.0)
        close(mean[b], R)
        close(cov[b], U)


@pytest.mark.parametrize("direct", [True, False])
def test_the_kl_of_the_memory_is_exact_or_that_of_larimar(direct):
    for parity in (False, True):
        module = gpm(direct, observation_noise_std=0.3, parity=parity)
        (mean, cov), kl = module.write_to_memory(draw(T, B, C))
        prior, want = (np.exp(0.2) + 1e-6) * np.eye(K), []
        for R, U in zip(mean.detach().numpy(), cov.detach().numpy(), strict=True):
            shift = ((R - mean_of(module)) ** 2).sum() / prior[0, 0]
            if parity:
                q, p = np.diag(U), np.diag(prior)
                want.append(C * (q / p).sum() + shift - C * K + C * (np.log(p) - np.log(q)).sum())
                assert not direct or np.array_equal(U, prior)
            else:
                log_ratio = np.linalg.slogdet(prior)[1] - np.linalg.slogdet(U)[1]
                want.append(0.5 * (C * np.trace(U) / prior[0, 0] + shift - K * C + C * log_ratio))
        close(kl, np.mean(want))


@pytest.mark.parametrize("setting", W_LOGVAR)
def test_a_read_has_the_numbers_of_the_equations(setting):
    module, cues = gpm(w_logvar_setting=setting, deterministic=True), draw(Q, B, C, seed=1)
    state = module.write_to_memory(draw(T, B, C))[0]
    z, w, w_mean, w_logvar = module.read_with_encoded_input(cues, state, get_w=True)
    w_logvar = w_logvar.expand(Q, B, K)
    for q in range(Q):
        for b in range(B):
            M, cue = state.mean[b].detach().numpy(), cues[q, b].numpy()
            want = cue @ np.linalg.pinv(M, rcond=1e-7)  # of rank T
            close(w_mean[q, b], want, rtol=1e-5, atol=1e-5)  # rounding of M over λ = 1.5e-8
            close(z[q, b], want @ M, rtol=1e-8, atol=1e-8)
            entries = {name: x.numpy() for name, x in module.state_dict().items()}
            taken = {2: cue, 3: M.ravel(), 4: np.concatenate([cue, M.ravel()])}.get(setting)
            logvar = (
                entries["w_logvar"] if taken is None else entries["w_logvar.weight"] @ taken + entries["w_logvar.bias"]
            )
            close(w_logvar[q, b], np.broadcast_to(logvar, K))
    assert w is w_mean
    want = 0.5 * (w_logvar.exp() + w_mean**2 - 1 - w_logvar).detach()
    close(module.read_with_encoded_input(cues, state, reduce_kl=False)[1], want)
    close(module.read_with_encoded_input(cues, state)[1], want.sum(-1))


def test_samples_of_a_read_have_the_moments_of_their_law():
    n, module = 20_000, gpm(observation_noise_std=0.5)
    state = module.write_to_memory(draw(T, 1, C))[0]
    cue = draw(1, 1, C, seed=1).expand(n, 1, C)
    torch.manual_seed(0)
    z, w, w_mean, w_logvar = module.read_with_encoded_input(cue, state, get_w=True)
    noise = (w - w_mean) / (0.5 * w_logvar).exp(), (z - w @ state.mean) / 0.5
    more = module.read_with_encoded_input(cue, state, get_w=True, deterministic=True, sigma_w=0.2)
    for sample in (*noise, (more[1] - more[2]) / 0.2):
        count = sample.numel()  # six standard errors
        assert abs(sample.mean()) < 6 / count**0.5
        assert abs(sample.std() - 1) < 6 / (2 * count) ** 0.5


def test_nothing_is_drawn_in_a_deterministic_read():
    module, cues = gpm(observation_noise_std=0.5), draw(Q, B, C, seed=1)
    state = module.write_to_memory(draw(T, B, C))[0]
    before = torch.get_rng_state()
    first = module.read_with_encoded_input(cues, state, deterministic=True)[0]
    module.deterministic = True
    assert torch.equal(module.read_with_encoded_input(cues, state)[0], first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("direct", [True, False])
def test_float32_reads_what_it_wrote_at_every_scale(direct, identity, scale):
    """Also where patterns repeat, and the least squares have no full rank."""
    torch.manual_seed(0)
    module = larimar.GPM(48, 32, direct, False, identity=identity, deterministic=True)
    codes = scale * draw(8, B, 48, dtype=torch.float32)
    codes = torch.cat([codes, codes[:4]])
    state, kl = module.write_to_memory(codes)
    assert kl.isfinite()
    assert torch.linalg.eigvalsh(state.cov.double()).min() > 0
    assert_close(module.read_with_encoded_input(codes, state)[0].detach(), codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    codes = draw(T, B, C, dtype=dtype)
    module = gpm(w_logvar_setting=4, identity=True, deterministic=True).to(dtype)
    state, _ = module.write_to_memory(codes)
    assert state.mean.dtype == state.cov.dtype == torch.float32
    z, dkl_w = module.read_with_encoded_input(codes, state)
    assert (z.dtype, dkl_w.dtype) == (dtype, torch.float32)
    assert_close(z, codes)
    with torch.autocast("cpu", dtype):
        z, _ = module.float().read_with_encoded_input(codes, module.write_to_memory(codes)[0])
    assert_close(z, codes.float())


@pytest.mark.parametrize("direct", [True, False])
def test_gradients_reach_the_prior_and_the_variance_of_the_weights(direct):
    module = gpm(direct, observation_noise_std=0.3)
    state, dkl_M = module.write_to_memory(draw(T, B, C))
    z, dkl_w = module.read_with_encoded_input(draw(Q, B, C, seed=1), state)
    (z.square().sum() + dkl_M + dkl_w.sum()).backward()
    assert module.memory_mean.grad.abs().sum() > 0
    assert module.w_logvar.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"w_logvar_setting": 5}, ValueError, "w_logvar_setting"),
        ({"observation_noise_std": -1.0}, ValueError, "observation_noise_std"),
        ({"least_noise_var": float("nan")}, ValueError, "least_noise_var"),
    ],
)
def test_a_wrong_option_is_named(options, error, named):
    with pytest.raises(error, match=named):
        larimar.GPM(C, K, True, False, **options)


def test_wrong_codes_are_named():
    module = gpm()
    state = module.write_to_memory(draw(T, B, C))[0]
    for call in (module.write_to_memory, lambda z: module.read_with_encoded_input(z, state)):
        with pytest.raises(ValueError, match=r"input_encoded must be a tensor of shape \[T, B, C\]"):
            call(draw(B, C))
        with pytest.raises(TypeError, match="input_encoded must be a tensor"):
            call([1.0])
        with pytest.raises(ValueError, match="must have shape"):
            call(draw(T, B, C + 1))


def test_the_benchmark_verifies_before_it_times(capsys, monkeypatch):
    benchmark = pytest.importorskip("benchmarks.larimar", reason="needs the source tree")
    assert benchmark.compare(K=16, C=24, T=4, batch=2, seconds=0.01) > 0  # how much is the machine's affair
    assert "| both |" in capsys.readouterr().out
    monkeypatch.setattr(benchmark, "pseudo_inverse", lambda A, steps: A.mT)
    with pytest.raises(SystemExit, match="equations is wrong, so that nothing was timed"):
        benchmark.compare(K=16, C=24, T=4, batch=2, seconds=0.01)
    assert "| both |" not in capsys.readouterr().out


# ---- around both -----------------------------------------------------------------------------------------------------


def deepmind_episode():
    memory = deepmind.KanervaMemory(C, K).double()

    def run(z):
        state, *rest = memory.update_state(z, memory.get_prior_state(B))
        return *state, *rest, *memory.read_with_z(z, state), memory.get_dkl_total(state)

    return run


def larimar_episode():
    memory = gpm(deterministic=True)

    def run(z):
        state, dkl_M = memory.write_to_memory(z)
        return *state, dkl_M, *memory.read_with_encoded_input(z, state)

    return run


@pytest.mark.parametrize("make", [deepmind_episode, larimar_episode])
def test_an_episode_compiles_without_a_break(make):
    torch.compiler.reset()
    run, z = make(), draw(T, B, C)
    torch.testing.assert_close(torch.compile(run, backend="eager", fullgraph=True)(z), run(z), **CLOSE)


@pytest.mark.parametrize("make", [deepmind_episode, larimar_episode])
def test_an_episode_without_patterns_leaves_a_finite_memory(make):
    assert all(x.isfinite().all() for x in make()(draw(0, B, C)))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def changed(state_dict: dict, fault: str) -> tuple[dict, str]:
    """A state_dict with one fault in its last entry, and what the error must name."""
    changed, name = {key: x + 1 for key, x in state_dict.items()}, list(state_dict)[-1]
    if fault == "foreign":
        return changed | {"stranger": torch.zeros(1)}, "stranger is foreign"
    x = changed.pop(name)
    if fault == "missing":
        return changed, f"{name} is missing"
    wrong = torch.zeros(5, 5, 5) if fault == "misshapen" else x.tolist()
    return changed | {name: wrong}, f"{name} must be a tensor of shape"


MODULES = {
    "deepmind": kanerva,
    "larimar": gpm,
    "larimar, linear": lambda: gpm(w_logvar_setting=2),
}


@pytest.mark.parametrize("fault", ["foreign", "missing", "misshapen", "no tensor"])
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_a_state_dict_that_does_not_fit_changes_nothing(make, fault):
    module = make()
    before = entries(module)
    wrong, named = changed(before, fault)
    with pytest.raises(RuntimeError, match=f"nothing was loaded: {named}"):
        module.load_state_dict(wrong)
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_a_state_dict_that_fits_is_loaded_also_into_a_copy(make):
    module = copy.deepcopy(make())
    wanted = {name: x + 1 for name, x in entries(module).items()}
    assert not any(module.load_state_dict(wanted))
    assert all(torch.equal(x, wanted[name]) for name, x in module.state_dict().items())
    partial = dict(list(wanted.items())[:1])
    assert module.load_state_dict(partial, strict=False).missing_keys == list(wanted)[1:]
