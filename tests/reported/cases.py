"""Cases of the Python API that users reported. Each passes when the behaviour is right.

    python -m tests.reported.cases            every case in a process of its own, one line each
    python -m tests.reported.cases NAME ...   those, in this process, with their tracebacks

Where two answers are right (it works, or a refusal in words) the case takes both. Cases with equal numbers belong to
one kind of fault.
"""

import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np
import torch

import fastkm
from fastkm import KanervaMemory, KroneckerCovariance, MatrixNormal, MemoryState
from fastkm.models import ConvDecoder, ConvEncoder, DynamicKanervaMachine

LinAlgError = torch.linalg.LinAlgError
BACKENDS = ("native", "reference")
CASES = []


def case(function):
    CASES.append(function)
    return function


def prior(B=2, K=4, C=6, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return MemoryState(torch.randn(B, K, C, generator=g).to(dtype), torch.eye(K, dtype=dtype).repeat(B, 1, 1))


def codes(B=2, T=5, C=6, dtype=torch.float32, seed=1):
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(seed)).to(dtype)


def double(x):
    return MemoryState(*(y.double() for y in x)) if isinstance(x, tuple) else x.double()


def images(*shape):
    return (torch.rand(*shape, 1, 28, 28, generator=torch.Generator().manual_seed(0)) < 0.2).float()


def machine(C=8, K=4, encoder=None, decoder=None):
    torch.manual_seed(0)
    return DynamicKanervaMachine(encoder or ConvEncoder(C, 2), decoder or ConvDecoder(C, 2), KanervaMemory(C, K))


def refusal(call, *kinds):
    """The words of a refusal of one of these kinds; anything else is not a right answer."""
    try:
        got = call()
    except kinds as error:
        return str(error)
    raise AssertionError(f"not refused, got {got!r:.200}")


def alone():
    """A process group of one."""
    import torch.distributed as d

    d.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
    return d


# ---- silent wrong answers ------------------------------------------------------------------------------------------


@case
def case_13_negated_view_is_saved_with_its_sign():
    s = MemoryState(torch._neg_view(prior().mean), prior().cov)
    path = tempfile.mktemp(suffix=".safetensors")
    fastkm.save_memory_state(s, path)
    assert torch.equal(fastkm.load_memory_state(path).mean, s.mean), "the file holds the other sign"


def _kl_of_one_step(x, dtype, backend):
    """KL of a pattern with wᵀUw/σ² = x that lies on the mean, and the truth from the series."""
    s = MemoryState(torch.zeros(1, 1, 100, dtype=dtype), torch.ones(1, 1, 1, dtype=dtype))
    w = torch.full((1, 1, 1), x**0.5, dtype=dtype)
    exact = w.double().item() ** 2
    truth = 50 * sum((-1) ** n * (n - 1) / n * exact**n for n in range(2, 12))  # log1p(x) − x / (1 + x), times C/2
    return fastkm.update_posterior(s, w, torch.zeros(1, 1, 100, dtype=dtype), 1.0, backend=backend).kl.item(), truth


@case
def case_22_kl_of_a_small_step_has_the_wrong_sign():
    for backend in BACKENDS:
        for x, dtype in ((1e-5, torch.float32), (1e-4, torch.float32), (1e-9, torch.float64)):
            kl, truth = _kl_of_one_step(x, dtype, backend)
            assert abs(kl - truth) <= 0.01 * truth, f"{backend}, x = {x}: {kl} for {truth}"


@case
def case_22_kl_is_never_negative():
    s = prior(64, 4, 100)
    w = 3e-3 * torch.rand(64, 8, 1, generator=torch.Generator().manual_seed(0)).expand(64, 8, 4).contiguous()
    for backend in BACKENDS:
        kl = fastkm.update_posterior(s, w, w @ s.mean, 1.0, backend=backend).kl
        assert (kl >= 0).all(), f"{backend}: {(kl < 0).float().mean():.0%} of all are negative"


@case
def case_21_reference_returns_negative_variances_inside_the_documented_range():
    """wᵀUw/σ² = 1e4, and float32 is said to be safe below 1e5."""
    s = prior(1, 8, 16)
    w = torch.zeros(1, 512, 8)
    w[..., 0] = 1
    r = fastkm.update_posterior(s, w, codes(1, 1, 16).repeat(1, 512, 1), 1e-4, backend="reference")
    assert (r.state.cov.diagonal(dim1=1, dim2=2) >= 0).all(), r.state.cov[0, 0, 0].item()
    fastkm.kl_memory(r.state, s)


@case
def case_20_update_with_too_little_noise_is_right_or_refused():
    s, z, w = prior(), codes()[:, :1].repeat(1, 6, 1), torch.ones(2, 6, 4)
    for noise in (1e-12, 1e-30):
        truth = fastkm.update_posterior(double(s), double(w), double(z), 1e-6).kl  # the same to 1e-5: only x → ∞ counts
        for backend in BACKENDS:
            try:
                kl = fastkm.update_posterior(s, w, z, noise, backend=backend).kl
            except LinAlgError:
                continue
            assert (kl[:, 1:] > 0.5 * truth[:, 1:]).all(), f"{backend}, {noise}: {kl[0].tolist()}"


class _Linear(torch.nn.Module):
    def __init__(self, a, b, decode=False):
        super().__init__()
        self.layer, self.decode = torch.nn.Linear(a, b), decode

    def forward(self, x):
        y = self.layer(x.flatten(1))
        if not self.decode:
            return y
        pixels = torch.distributions.Bernoulli(logits=y.view(-1, 1, 3, 3), validate_args=False)
        return torch.distributions.Independent(pixels, 3, validate_args=False)


def _loss_and_gradients(m, episode, mask, cues=None):
    torch.manual_seed(1)
    m.zero_grad()
    loss = m.loss(episode, mask=mask, cues=cues).total
    loss.backward()
    return loss.item(), [p.grad.clone() for p in m.parameters()]


@case
def case_24_masked_nan_pattern_in_the_model():
    m = machine(encoder=_Linear(9, 8), decoder=_Linear(8, 9, decode=True))
    x = (torch.rand(2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 3] = False
    hole = x.clone()
    hole[0, 3] = float("nan")
    want = _loss_and_gradients(m, x, mask)
    for arguments in ((hole, mask), (x, mask, hole)):
        loss, gradients = _loss_and_gradients(m, *arguments)
        assert loss == want[0], (loss, want[0])
        assert all(map(torch.equal, gradients, want[1])), "the loss is right and the gradients are NaN"


class _Pixels(torch.nn.Module):
    """A decoder with ``independent`` of its three event axes declared, and ``rows`` of its batch."""

    def __init__(self, independent, rows=None):
        super().__init__()
        self.codec, self.independent, self.rows = ConvDecoder(8, 2), independent, rows

    def forward(self, z):
        d = torch.distributions
        pixels = d.Bernoulli(logits=self.codec.layers(z)[: self.rows])
        return d.Independent(pixels, self.independent) if self.independent else pixels


@case
def case_32_decoder_without_event_axes():
    for B, T in ((1, 4), (28, 28)):
        for independent in (0, 1, 2):
            if B == 28 and independent:
                continue
            m = machine(decoder=_Pixels(independent))
            words = refusal(lambda m=m, B=B, T=T: m.loss(images(B, T)).total, ValueError)
            assert "event" in words or "batch" in words, words


@case
def case_60_two_trainers_one_checkpoint():
    from examples.dkm.patterns import Patterns
    from examples.dkm.training import Settings, Trainer, read_checkpoint

    s = Settings(steps=1, batch=1, patterns=4, rows=4, code_size=4, width=1)
    data = Patterns("strokes", "", images(16), images(4))
    trainers = [Trainer(s._replace(width=width), data) for width in (1, 8)]
    for trainer in trainers:
        list(trainer.run())
    path, errors = Path(tempfile.mkdtemp()) / "one.safetensors", []

    def work(trainer):
        for _ in range(150):
            try:
                trainer.save(path)
                read_checkpoint(path)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(t,)) for t in trainers]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not errors, f"{len(errors)} of 300: {sorted({e[:60] for e in errors})}"


# ---- PyTorch around it ---------------------------------------------------------------------------------------------


@case
def case_01_floats_first_used_under_inference_mode():
    s, z = prior(), codes()
    w = torch.ones(2, 5, 4)
    calls = (
        lambda m: fastkm.write(MemoryState(m, s.cov), z, 0.37, 0.73).state.mean,
        lambda m: fastkm.read(m, z, 0.41).values,
        lambda m: fastkm.solve_addressing(m, z, 0.42),
        lambda m: fastkm.update_posterior(MemoryState(m, s.cov), w, z, 0.43).state.mean,
    )
    with torch.inference_mode():
        for call in calls:
            call(s.mean)
    for call in calls:
        m = s.mean.clone().requires_grad_()
        call(m).sum().backward()
        assert m.grad.isfinite().all()


@case
def case_02_fully_shard_takes_the_memory():
    d = alone()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(KanervaMemory(8, 4, learn_obs_noise=True), mesh=init_device_mesh("cpu", (1,)))
    d.destroy_process_group()


@case
def case_03_model_under_ddp():
    d = alone()
    torch.nn.parallel.DistributedDataParallel(machine())(images(2, 4))
    d.destroy_process_group()


@case
def case_04_readme_loss_under_ddp():
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = KanervaMemory(8, 4)

        def forward(self, z):
            written = self.memory.write(z)
            values, _ = self.memory.read(z, written.state)
            return (values - z).square().mean() + self.memory.kl(written.state).mean()

    d = alone()
    model = torch.nn.parallel.DistributedDataParallel(Loss())
    for _ in range(2):
        model(codes(2, 5, 8)).backward()
    d.destroy_process_group()


@case
def case_06_torch_load_of_results():
    path = tempfile.mktemp()
    for x in (prior(), fastkm.write(prior(), codes(), 1.0, 1.0), fastkm.read(prior().mean, codes(), 1.0)):
        torch.save({"x": x}, path)
        assert type(torch.load(path)["x"]) is type(x)


class _Write(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.memory = KanervaMemory(6, 4)

    def forward(self, z):
        return self.memory.write(z)


class _Given(torch.nn.Module):
    def forward(self, state, z):
        return fastkm.write(state, z, 1.0, 1.0).state.mean


@case
def case_07_export_keeps_the_named_tuples():
    path = tempfile.mktemp(suffix=".pt2")
    for module, arguments in ((_Write(), (codes(),)), (_Given(), (prior(), codes()))):
        with torch.no_grad():
            torch.export.save(torch.export.export(module, arguments), path)
            leaves = torch.utils._pytree.tree_leaves
            got, want = leaves(torch.export.load(path).module()(*arguments)), leaves(module(*arguments))
        assert all(map(torch.equal, got, want))


@case
def case_07_export_generate_with_a_count_from_a_shape():
    class Generate(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = KanervaMemory(6, 4)

        def forward(self, mean, cov, like):
            return self.memory.generate(MemoryState(mean, cov), like.shape[1])

    with torch.no_grad():
        torch.export.export(
            Generate(), (*prior(), codes()), dynamic_shapes=(None, None, {1: torch.export.Dim("Q", min=2, max=64)})
        )


def _whole(f):
    return torch.compile(f, backend="aot_eager", fullgraph=True)


@case
def case_08_compile_a_distribution():
    _whole(lambda m, u: MatrixNormal(m, u, validate_args=False).rsample())(*prior())
    _whole(lambda m, u: KroneckerCovariance(u).solve(m))(*prior())


@case
def case_08_compile_a_read_of_a_sample():
    mem = KanervaMemory(6, 4, sample_memory=True)
    _whole(lambda q, m, u: mem.read(q, MemoryState(m, u)).values)(codes(), *prior())


@case
def case_09_vmap_over_distributions():
    m, u = torch.randn(5, 3, 4), torch.eye(3).repeat(5, 1, 1)
    mapped = torch.func.vmap(lambda a, b: MatrixNormal(a, b, validate_args=False).log_prob(a))(m, u)
    torch.testing.assert_close(mapped, MatrixNormal(m, u).log_prob(m))


@case
def case_10_shapes_on_meta():
    with torch.device("meta"):
        mem, z = KanervaMemory(6, 4), torch.empty(2, 5, 6)
        s = MemoryState(torch.empty(2, 4, 6), torch.empty(2, 4, 4))
    assert mem.write(z).state.mean.shape == (2, 4, 6)
    assert fastkm.read(s.mean, z, 1.0).values.shape == z.shape
    assert fastkm.kl_memory(s, s).shape == (2,)


@case
def case_10_shapes_of_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        s, z = MemoryState(torch.empty(2, 4, 6), torch.empty(2, 4, 4)), torch.empty(2, 5, 6)
        assert fastkm.write(s, z, 1.0, 1.0).weights.shape == (2, 5, 4)
        assert fastkm.read(s.mean, z, torch.ones(2)).weights.shape == (2, 5, 4)


@case
def case_11_a_float_that_changes_compiles_twice_at_most():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    f = torch.compile(lambda m, z, v: fastkm.read(m, z, v).values, backend=counter)
    for i in range(7):
        f(prior().mean, codes(), 1.0 + i / 100)
    assert counter.frame_count <= 2, counter.frame_count


@case
def case_12_trace_the_layer():
    warnings.simplefilter("ignore")
    memory = KanervaMemory(6, 4)
    with torch.no_grad():
        traced = torch.jit.trace(lambda z: memory.write(z).state.mean, (codes(),))
        assert traced(codes(seed=3)).shape == (2, 4, 6)


@case
def case_17_low_precision_codes_without_a_state():
    mem = KanervaMemory(6, 4)
    z = codes().bfloat16()
    assert torch.equal(mem.write(z).kl, mem.write(z, mem.prior_state(2)).kl)


@case
def case_19_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        fastkm.read(prior(4, 32, 100).mean, codes(4, 32, 100), 1.0, backend="native")
    assert counter.get_total_flops() > 0


@case
def case_45_reload():
    import importlib

    importlib.reload(fastkm._runtime.schema)
    fastkm.write(prior(), codes(), 1.0, 1.0)


# ---- numerics: refused without need, or with the wrong words -------------------------------------------------------


@case
def case_23_repeated_patterns_for_ever():
    """Goes on, or says what helps: float64, more noise."""
    s, z = prior(1, 16, 32), codes(1, 10, 32)
    words = "float64"
    try:
        for t in range(30_000):
            s = fastkm.write(s, z[:, t % 10 : t % 10 + 1], 1e-2, 1e-2).state
    except LinAlgError as error:
        words = str(error)
    assert "float64" in words, words


@case
def case_25_the_error_names_what_is_wrong():
    """The covariance is the identity in every one of these calls."""
    s, z = prior(), codes()
    hole = z.clone()
    hole[0, 0, 0] = float("nan")
    mean = s.mean.clone()
    mean[0, 0, 0] = float("nan")
    calls = (
        lambda b: fastkm.write(s, hole, 1.0, 1.0, backend=b),
        lambda b: fastkm.write(MemoryState(mean, s.cov), z, 1.0, 1.0, backend=b),
        lambda b: fastkm.write(prior(2, 9, 6), z, 1.0, 1e-30, backend=b),
    )
    for backend in BACKENDS:
        for call in calls:
            words = refusal(lambda c=call, b=backend: c(b), LinAlgError, ValueError)
            assert not words.startswith("state.cov is not positive definite"), words


@case
def case_27_a_memory_of_512_rows_and_little_noise():
    """wᵀUw/σ² is 5e7: taken by the next call, or refused by the one that made it."""
    s = MemoryState(torch.eye(512, 896)[None], (1 + 1e-6) * torch.eye(512)[None])
    for backend in BACKENDS:
        try:
            r = fastkm.write(s, 30 * codes(1, 64, 896), 0.01, 0.01, backend=backend)
        except LinAlgError:
            continue
        assert fastkm.kl_memory(r.state, s, backend=backend).isfinite().all()


@case
def case_29_a_subnormal_tensor_is_refused_like_a_float():
    v = torch.tensor(1e-40)
    calls = (
        lambda b: fastkm.read(prior().mean, codes(), v, backend=b),
        lambda b: fastkm.solve_addressing(prior().mean, codes(), v, backend=b),
        lambda b: fastkm.write(prior(), codes(), v, 1.0, backend=b),
        lambda b: fastkm.update_posterior(prior(), torch.ones(2, 5, 4), codes(), v, backend=b),
    )
    for backend in (None, *BACKENDS):
        for call in calls:
            words = refusal(lambda c=call, b=backend: c(b), ValueError)
            assert "csrc" not in words, words


# ---- arguments -----------------------------------------------------------------------------------------------------


@case
def case_31_numpy_scalars():
    a, n = np.float32(0.5), np.int64(2)
    fastkm.write(prior(), codes(), a, a, num_opt_iters=n)
    fastkm.read(prior().mean, codes(), a, num_iters=n)
    KanervaMemory(np.int64(6), np.int64(4), obs_noise_stddev=a).prior_state(n)
    fastkm.attractor_read(prior(), codes(), a, a, clean=torch.tanh, num_iters=n, tol=a, weight_var=a)


@case
def case_b_any_pair_is_a_state():
    pair = tuple(prior())
    fastkm.save_memory_state(pair, tempfile.mktemp(suffix=".safetensors"))
    KanervaMemory(6, 4).kl(pair)
    machine(6, 4).attractor_read(images(2, 4), 2, state=pair)
    machine(6, 4).generate(2, 2, state=pair)


@case
def case_c_a_file_that_is_no_state_is_named():
    from safetensors.torch import save_file

    path = tempfile.mktemp(suffix=".safetensors")
    files = (
        {"history": torch.zeros(1)},
        {"mean": prior().mean},
        {**prior()._asdict(), "more": torch.zeros(1)},
        {"mean": torch.zeros(3), "cov": torch.zeros(2, 2)},
        {"mean": prior().mean.half(), "cov": prior().cov.half()},
    )
    for tensors in files:
        save_file(tensors, path)
        words = refusal(lambda: fastkm.load_memory_state(path), ValueError, TypeError)
        assert path in words, words


@case
def case_g_attractor_read_takes_low_precision_queries_as_read_does():
    z = codes().bfloat16()
    fastkm.read(prior().mean, z, 1.0)
    fastkm.attractor_read(prior(), z, 1.0, 1.0, clean=torch.tanh, num_iters=2)


@case
def case_j_a_layout_without_kernels():
    for q in (codes().to_sparse(), codes().to_mkldnn()):
        words = refusal(lambda q=q: fastkm.read(prior().mean, q, 1.0), TypeError, ValueError)
        assert words.startswith("queries"), words


@case
def case_k_a_count_that_no_operator_takes():
    for call in (
        lambda: fastkm.read(prior().mean, codes(), 1.0, num_iters=2**63),
        lambda: fastkm.write(prior(), codes(), 1.0, 1.0, num_opt_iters=2**63),
        lambda: KanervaMemory(2**63, 4),
    ):
        words = refusal(call, ValueError)
        assert words.startswith(("num_", "code_size")), words


def main() -> int:
    names = sys.argv[1:]
    if names:
        for function in CASES:
            if function.__name__ in names:
                function()
        return 0
    failed = 0
    for function in CASES:
        name = function.__name__
        try:
            command = [sys.executable, "-B", "-m", "tests.reported.cases", name]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            code, words = done.returncode, (done.stderr.strip().splitlines() or [""])
        except subprocess.TimeoutExpired:
            code, words = 124, ["took longer than two minutes"]
        if code:
            failed += 1
            errors = [w for w in words if not w.startswith(" ") and ("Error" in w or "Exception" in w)]
            said = (errors or words)[-1]
            print(f"FAIL {name}: {said[:150]}", flush=True)
        else:
            print(f"pass {name}", flush=True)
    print(f"{failed} of {len(CASES)} fail")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
