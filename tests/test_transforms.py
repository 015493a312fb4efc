"""The native kernels inside what PyTorch does to functions: torch.func, checkpoints, data parallelism, autocast."""

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import TRANSFORMED, call, flat, problem
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastkm
from fastkm import KanervaMemory, MemoryState
from fastkm._runtime import schema

pytestmark = pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))


def as_function(operation, p, backend="native", **options):
    """Of the tensors of ``p``, the mask among them, to a tuple of tensors; of a ``cov`` that is made symmetric."""

    def function(mean, cov, *rest):
        rest = rest if p.mask is not None else (*rest, None)
        state = MemoryState(mean, (cov + cov.mT) / 2)
        result = call(operation, oracle.Problem(state, *rest), backend, **options)
        return tuple(flat(result).values())

    return function


def scalar(function):
    """A function whose every output counts, as one number."""
    return lambda *tensors: sum(
        (x * torch.linspace(1, 2, x.numel()).to(x).view(x.shape)).sum() for x in function(*tensors)
    )


def stacked(*problems):
    return [torch.stack(x) for x in zip(*map(oracle.tensors, problems), strict=True)]


def assert_all_close(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        oracle.assert_close(x, y)


# ----------------------------------------------------------------------------------------------------------------- vmap


@pytest.mark.parametrize("operation", TRANSFORMED)
@pytest.mark.parametrize("masked", [False, True])
def test_vmap_is_the_loop(operation, masked):
    """Bit for bit: every memory is computed on its own, wherever it sits."""
    problems = [problem(2, 5, 3, 4, 6, seed=seed, masked=masked) for seed in range(3)]
    function = as_function(operation, problems[0])
    mapped = vmap(function)(*stacked(*problems))
    for x, *each in zip(mapped, *(function(*oracle.tensors(p)) for p in problems), strict=True):
        assert torch.equal(x, torch.stack(each))


@pytest.mark.parametrize("where", range(7))
def test_vmap_over_one_argument_and_any_axis(where):
    """The others are shared. Arguments that the operation takes no part in are not: nothing is mapped then."""
    p = problem(2, 5, 3, 4, 6)
    tensors, axes = oracle.tensors(p), [None] * 7
    axes[where] = tensors[where].dim() - 1  # mapped over an axis beside the last
    many = torch.stack([tensors[where], tensors[where] * 1.5], axes[where])
    for operation in TRANSFORMED:
        function = as_function(operation, p)
        mapped = vmap(function, in_dims=tuple(axes))(*tensors[:where], many, *tensors[where + 1 :])
        for i in range(2):
            alone = function(*tensors[:where], many.select(axes[where], i), *tensors[where + 1 :])
            assert all(torch.equal(x[i], y) for x, y in zip(mapped, alone, strict=True))


def test_vmaps_nest():
    p = problem(2, 5, 3, 4, 6)
    function = as_function("write", p)
    tensors = [torch.stack([torch.stack([x, 2 * x]), torch.stack([3 * x, 4 * x])]) for x in oracle.tensors(p)]
    mapped = vmap(vmap(function))(*tensors)
    for i in range(2):
        for j in range(2):
            assert all(
                torch.equal(x[i, j], y) for x, y in zip(mapped, function(*(x[i, j] for x in tensors)), strict=True)
            )


@pytest.mark.parametrize("shape", oracle.EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("operation", TRANSFORMED)
def test_vmap_of_nothing(operation, shape):
    p = problem(*shape)
    function = as_function(operation, p)
    mapped = vmap(function)(*stacked(p, p, p))
    for x, y in zip(mapped, function(*oracle.tensors(p)), strict=True):
        assert torch.equal(x, torch.stack([y, y, y]))


def test_vmap_of_scalars():
    """Noise and ridge as a sweep."""
    p = problem(2, 5, 3, 4, 6)
    sweep = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    mapped = vmap(lambda x: fastkm.write(p.state, p.values, x, x, backend="native").state.mean)(sweep)
    for x, mean in zip(sweep, mapped, strict=True):
        assert torch.equal(mean, fastkm.write(p.state, p.values, x, x, backend="native").state.mean)


def test_values_are_checked_under_vmap_too():
    p = problem(2, 5, 3, 4, 6)
    with pytest.raises(ValueError, match="ridge must be positive and finite"):
        vmap(lambda x: fastkm.solve_addressing(p.state.mean, p.queries, x, backend="native"))(
            torch.ones(2).double() * -1
        )
    covs = torch.stack([p.state.cov, p.state.cov])
    covs[1, 0, 0, 0] = -1
    with pytest.raises(torch.linalg.LinAlgError, match=r"cov is not positive definite in memory \[\[1, 0\]\]"):
        vmap(lambda cov: fastkm.matrix_normal.logdet(cov, backend="native"))(covs)


# ---------------------------------------------------------------------------------------------- gradients in torch.func


@pytest.mark.parametrize("operation", TRANSFORMED)
def test_grad_vmap_and_both_ways_round(operation):
    problems = [problem(2, 5, 3, 4, 6, seed=seed) for seed in range(2)]
    places = tuple(range(7))
    expected = [
        grad(scalar(as_function(operation, p, "reference")), argnums=places)(*oracle.tensors(p)) for p in problems
    ]
    f = scalar(as_function(operation, problems[0]))
    assert_all_close(grad(f, argnums=places)(*oracle.tensors(problems[0])), expected[0])
    together = [torch.stack(x) for x in zip(*expected, strict=True)]
    assert_all_close(vmap(grad(f, argnums=places))(*stacked(*problems)), together)
    assert_all_close(grad(lambda *x: vmap(f)(*x).sum(), argnums=places)(*stacked(*problems)), together)
    leaves = [x.requires_grad_() for x in stacked(*problems)]
    found = torch.autograd.grad(vmap(f)(*leaves).sum(), leaves, materialize_grads=True)
    assert_all_close(found, together)


@pytest.mark.parametrize("operation", TRANSFORMED)
def test_jacobians(operation):
    p = problem(2, 3, 2, 3, 2)
    for x, y in zip(
        *(jacrev(as_function(operation, p, b))(*oracle.tensors(p)) for b in ("native", "reference")), strict=True
    ):
        oracle.assert_close(x, y)


def test_gradients_per_episode_of_the_module():
    """vmap of grad of a functional call: the classic."""
    memory = KanervaMemory(6, 4, learn_obs_noise=True, backend="native").double()
    values = torch.randn(3, 2, 5, 6).double()

    def loss(parameters, values):
        def step(memory, values):
            state = memory.write(values).state
            return (memory.read(values, state).values - values).square().sum() + memory.kl(state).sum()

        return functional_call(Apply(memory, step), {f"module.{k}": v for k, v in parameters.items()}, (values,))

    found = vmap(grad(loss), in_dims=(None, 0))(dict(memory.named_parameters()), values)
    for i in range(3):
        expected = torch.autograd.grad(
            loss(dict(memory.named_parameters()), values[i]), list(memory.parameters()), allow_unused=True
        )
        for x, y in zip(found.values(), expected, strict=True):
            assert (x[i] == 0).all() if y is None else oracle.assert_close(x[i], y) is None


class Apply(nn.Module):
    def __init__(self, module, step):
        super().__init__()
        self.module, self.step = module, step

    def forward(self, *inputs):
        return self.step(self.module, *inputs)


# --------------------------------------------------------------------------------------------------- second derivatives


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("operation", TRANSFORMED)
def test_second_derivatives_are_those_of_finite_differences(operation, masked):
    """For every tensor that an operation is a function of, and for the cotangents, of every output."""
    p = problem(2, 3, 2, 4, 3, masked=masked)
    tensors = [x.clone().requires_grad_(x.is_floating_point()) for x in oracle.tensors(p)]
    assert torch.autograd.gradgradcheck(as_function(operation, p), tensors, fast_mode=True)


@pytest.mark.parametrize(
    ("operation", "options"),
    [
        ("write", {"num_opt_iters": 2}),
        ("write", {"method": "deepmind"}),
        ("read", {"num_iters": 3}),
        ("read", {"method": "deepmind", "num_iters": 2}),
        ("solve_addressing", {"method": "deepmind"}),
    ],
)
def test_second_derivatives_follow_the_options(operation, options):
    p = problem(1, 3, 2, 3, 2)
    tensors = [x.clone().requires_grad_() for x in oracle.tensors(p)]
    assert torch.autograd.gradgradcheck(as_function(operation, p, **options), tensors, fast_mode=True)


def test_the_log_determinant_has_a_second_derivative():
    root = problem(2, 1, 1, 4, 1).state.cov.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda a: fastkm.matrix_normal.logdet(a @ a.mT, backend="native"), root)


@pytest.mark.parametrize("operation", TRANSFORMED)
def test_second_derivatives_of_torch_func_are_those_of_the_reference(operation):
    p = problem(1, 2, 2, 3, 2)
    tensors = oracle.tensors(p)

    def derivatives(backend):
        f = scalar(as_function(operation, p, backend))
        mapped = vmap(grad(f), in_dims=(0, *[None] * (len(tensors) - 1)))
        return (
            jacrev(jacrev(f))(*tensors),
            grad(lambda mean: mapped(mean.unsqueeze(0), *tensors[1:]).square().sum())(tensors[0]),
            grad(lambda mean: sum(x.sum() for x in grad(f, argnums=(1, 2, 3, 4, 6))(mean, *tensors[1:])))(tensors[0]),
        )

    assert_all_close(derivatives("native"), derivatives("reference"))


@pytest.mark.parametrize("operation", TRANSFORMED)
def test_a_third_derivative_is_that_of_the_reference(operation):
    p = problem(1, 2, 2, 3, 2)
    tensors = oracle.tensors(p)
    found = []
    for backend in ("native", "reference"):
        x, f = tensors[0].clone().requires_grad_(), scalar(as_function(operation, p, backend))
        y = f(x, *tensors[1:])
        for _ in range(3):
            (y,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(y.detach())
    oracle.assert_close(*found)


@pytest.mark.parametrize("operation", TRANSFORMED)
def test_forward_mode_raises(operation):
    p = problem(1, 2, 2, 3, 2)
    tensors = tuple(oracle.tensors(p))
    f = scalar(as_function(operation, p))
    for transformed in (lambda: jvp(f, tensors, tensors), lambda: jacfwd(f)(*tensors), lambda: hessian(f)(*tensors)):
        with pytest.raises(NotImplementedError, match="jvp"):
            transformed()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        f(forward_ad.make_dual(tensors[0], tensors[0]), *tensors[1:])


def test_a_first_derivative_that_is_kept_is_right():
    """create_graph changes no value."""
    p = problem(2, 5, 3, 4, 6)
    x = p.values.clone().requires_grad_()
    total = fastkm.write(p.state, x, p.noise_var, p.ridge, backend="native").state.mean.square().sum()
    (kept,) = torch.autograd.grad(total, x, create_graph=True)
    (plain,) = torch.autograd.grad(total, x)
    assert torch.equal(kept, plain)
    assert kept.requires_grad
    assert not plain.requires_grad


# ------------------------------------------------------------------------------------------------ checkpoint, processes


class Model(nn.Module):
    """A linear encoder, the memory, a linear decoder; the loss of each episode [B]."""

    def __init__(self, backend="native"):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(9, 6), nn.Linear(6, 9)
        self.memory = KanervaMemory(6, 4, learn_obs_noise=True, backend=backend)

    def forward(self, x):
        code = self.encoder(x)
        state, weights, _, _ = self.memory.write(code)
        decoded = self.decoder(self.memory.read(code, state).values)
        kl = self.memory.kl(state) + self.memory.kl_weights(weights).sum(-1)
        return (decoded - x).square().sum((1, 2)) + kl


def model():
    torch.manual_seed(0)
    return Model().double(), torch.randn(4, 5, 9).double()


def gradients(module, loss):
    return torch.autograd.grad(loss, list(module.parameters()))


def test_checkpoint():
    """The same bits, computed again on the way back."""
    module, x = model()
    plain = gradients(module, module(x).mean())
    again = gradients(module, checkpoint(module, x, use_reentrant=False).mean())
    assert all(map(torch.equal, plain, again))


def test_state_dict_round_trip(tmp_path):
    """After a step of training, on disk and back: the same loss and the same gradients."""
    module, x = model()
    optimizer = torch.optim.Adam(module.parameters())
    module(x).mean().backward()
    optimizer.step()
    torch.save(module.state_dict(), tmp_path / "model.pt")
    torch.manual_seed(1)
    other = Model().double()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(module(x), other(x))
    assert all(map(torch.equal, gradients(module, module(x).mean()), gradients(other, other(x).mean())))


def share_of(rank, path, found):
    """What each of two processes does: its half of the batch, twice."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    module, x = model()
    parallel = DistributedDataParallel(module)
    for _ in range(2):
        module.zero_grad()
        parallel(x[2 * rank : 2 * rank + 2]).mean().backward()
    torch.save([parameter.grad for parameter in module.parameters()], f"{path}/{found}{rank}")
    dist.barrier()  # neither leaves while the other may still wait for it
    del parallel  # it holds the group, whose threads must end before the process does
    dist.destroy_process_group()


def test_two_processes_get_the_gradient_of_the_whole_batch(tmp_path):
    mp.spawn(share_of, args=(str(tmp_path), "gradients"), nprocs=2)
    module, x = model()
    expected = gradients(module, module(x).mean())
    first, second = (torch.load(tmp_path / f"gradients{rank}") for rank in range(2))
    assert all(map(torch.equal, first, second))
    assert_all_close(first, expected)


class ReadmeLoss(nn.Module):
    """The loss of the README: nothing in it depends on σw."""

    def __init__(self):
        super().__init__()
        self.memory = KanervaMemory(6, 4, learn_obs_noise=True)

    def forward(self, z):
        read, written = self.memory(z)
        return (read.values - z).square().mean() + self.memory.kl(written.state).mean()


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_loss_that_starts_from_the_prior_reaches_every_parameter(wrapped, group_of_one):
    """With a gradient of zero where it does not depend on one; otherwise DistributedDataParallel waits in vain."""
    torch.manual_seed(0)
    loss = ReadmeLoss()
    model = DistributedDataParallel(loss) if wrapped else loss
    for _ in range(2):
        model(torch.randn(2, 5, 6)).backward()
    assert all(x.grad is not None for x in loss.parameters())
    assert loss.memory.log_weight_stddev.grad == 0
    assert loss.memory.prior_log_var.grad != 0
    with torch.no_grad():
        loss.memory.log_weight_stddev.fill_(-torch.inf)  # no weight noise at all; the other gradients stay numbers
    loss.zero_grad()
    loss(torch.randn(2, 5, 6)).backward()
    assert all(x.grad.isfinite().all() for x in loss.parameters())


def test_the_gradient_of_the_prior_is_that_of_its_own_parameters():
    """The other parameters take part with zero and change nothing."""
    module = KanervaMemory(6, 4, learn_obs_noise=True).double()
    state = module.prior_state(3)
    weights = [torch.randn_like(x) for x in state]
    sum((x * w).sum() for x, w in zip(state, weights, strict=True)).backward()
    oracle.assert_close(module.prior_mean.grad, weights[0].sum(0))
    trace = weights[1].diagonal(dim1=1, dim2=2).sum() * module.prior_log_var.exp()
    oracle.assert_close(module.prior_log_var.grad, trace.detach())
    assert module.log_noise_stddev.grad == module.log_weight_stddev.grad == 0


def test_a_sharded_module_trains(group_of_one):
    torch.manual_seed(0)
    loss, whole = ReadmeLoss(), ReadmeLoss()
    whole.load_state_dict(loss.state_dict())
    x = torch.randn(2, 5, 6)
    fully_shard(loss, mesh=init_device_mesh("cpu", (1,)))
    loss(x).backward()
    whole(x).backward()
    for a, b in zip(loss.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a.grad.full_tensor(), b.grad)


def test_the_module_called_is_a_write_and_a_read():
    module, x, cues = KanervaMemory(6, 4), torch.randn(2, 5, 6), torch.randn(2, 3, 6)
    mask = torch.rand(2, 5) < 0.7
    read, written = module(x, cues, mask=mask, num_iters=2)
    expected = module.write(x, mask=mask)
    assert all(map(torch.equal, flat(written).values(), flat(expected).values()))
    assert all(map(torch.equal, read, module.read(cues, expected.state, 2)))
    again = module(x, state=written.state)
    assert torch.equal(again.read.values, module.read(x, module.write(x, written.state).state).values)


# ------------------------------------------------------------------------------------------------------------- autocast

LOW = (torch.bfloat16, torch.float16)
low_precision = pytest.mark.parametrize("low", LOW, ids=str)
either_backend = pytest.mark.parametrize("backend", ["native", "reference"])


@low_precision
@either_backend
@pytest.mark.parametrize("operation", [*TRANSFORMED, "attractor_read"])
def test_autocast_takes_low_precision_and_computes_in_float32(operation, backend, low):
    """Exactly as if the caller had widened the inputs, and outside of autocast nothing changes."""
    if operation == "attractor_read" and backend == "native":
        pytest.skip("attractor_read has the reference only")
    p = problem(2, 5, 3, 4, 6, torch.float32)
    p = p._replace(values=p.values.to(low), queries=p.queries.to(low))
    wide = oracle.map_tensors(p, torch.Tensor.float)
    expected = flat(call(operation, wide, backend))
    with torch.autocast("cpu", dtype=low):
        found = flat(call(operation, p, backend))
        for name, x in found.items():
            assert torch.equal(x, expected[name]), name
    narrow = oracle.map_tensors(p, lambda x: x.to(low))
    with pytest.raises(TypeError, match="must be float32"):
        call(operation, narrow, backend)


@low_precision
def test_a_codec_runs_under_autocast(low):
    p = problem(2, 5, 3, 4, 6, torch.float32)
    codec, seen = nn.Linear(6, 6), []

    def clean(code):
        seen.append(codec(code).dtype)
        return codec(code)

    with torch.autocast("cpu", dtype=low):
        call("attractor_read", p, None, clean=clean)
    assert set(seen) == {low}
    with pytest.raises(TypeError, match="clean must be a callable"), torch.autocast("cpu", dtype=low):
        call("attractor_read", p, None, clean=None)


@low_precision
@either_backend
def test_training_under_autocast(backend, low):
    """Linear layers in low precision, the memory and every gradient in float32."""
    torch.manual_seed(0)
    module, x = Model(backend), torch.randn(4, 5, 9)
    with torch.autocast("cpu", dtype=low):
        code = module.encoder(x)
        assert code.dtype == low
        state = module.memory.write(code).state
        assert {y.dtype for y in state} == {module.memory.read(code, state).values.dtype} == {torch.float32}
        loss = module(x).mean()
    found = gradients(module, loss)
    exact = gradients(module, module(x).mean())
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        assert oracle.error(a, b) <= 20 * torch.finfo(low).eps * oracle.largest(b)


@either_backend
def test_a_disabled_autocast_changes_nothing(backend):
    p = oracle.map_tensors(problem(2, 5, 3, 4, 6, torch.float32), torch.Tensor.bfloat16)
    with (
        torch.autocast("cpu", enabled=False),
        pytest.raises(TypeError, match="must be float32 or float64, got bfloat16"),
    ):
        call("write", p, backend)


def test_float64_stays_float64_under_autocast():
    p = problem(2, 5, 3, 4, 6)
    for backend in ("native", "reference"):
        expected = flat(call("write", p, backend))
        with torch.autocast("cpu"):
            assert all(torch.equal(x, expected[name]) for name, x in flat(call("write", p, backend)).items())


def test_kl_of_weights_and_logdet_under_autocast():
    p = problem(2, 5, 3, 4, 6, torch.float32)
    low = p.weights.bfloat16()
    with torch.autocast("cpu"):
        assert torch.equal(fastkm.kl_weights(low, 0.1, 1.0), fastkm.kl_weights(low.float(), 0.1, 1.0))
        cov = torch.eye(4).expand(2, 4, 4).bfloat16()
        assert torch.equal(fastkm.matrix_normal.logdet(cov), torch.zeros(2))
