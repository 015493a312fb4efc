"""filter_posterior on the GPU kernels: both laws of decay, cuts anywhere, masks, what is refused, and its gradient."""

import functools
import itertools

import oracle
import pytest
import torch
from oracle import map_tensors, poisoned, problem
from test_filtering import LAWS, OUTPUTS, decay_of, every_law, gradients, part_of, queries_of, run, truth

from fastkm import MemoryState, filter_posterior
from gpu.support import only_with_kernels, widened

# B, T, Q, K, C, masked, read: one step; less than a tile of each; T, K and C over one tile; T over two chunks; C over
# tiles that thread blocks share. Not every combination, because a GPU compiles each for seconds.
CASES = [
    ((3, 1, 0, 5, 7), False, "after"),
    ((2, 9, 0, 5, 7), True, "before"),
    ((1, 37, 0, 33, 40), False, "after"),
    ((2, 70, 0, 6, 9), True, "after"),
    ((1, 40, 0, 17, 6), False, "before"),
    ((1, 17, 0, 5, 150), True, "after"),
]
every_case = pytest.mark.parametrize(("shape", "masked", "read"), CASES, ids=str)
FLOAT32 = torch.float32
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def only_backends_that_filter(kernels):
    only_with_kernels(kernels, "filter_posterior")


def run_on(kernels, p, backend=None, **options):
    """On the device; a reference computes on the CPU."""
    if backend == "reference":
        return run(p, backend, **options)
    made = oracle.flat(run(kernels.put(p), kernels.backend, **options))
    return Outputs({name: x.cpu() for name, x in made.items()})


class Outputs(dict):
    def _asdict(self):
        return self


@every_case
@every_law
def test_filter_equals_the_steps(kernels, shape, masked, law, read):
    p = problem(*shape, FLOAT32, masked=masked)
    expected = truth(p, law=law, before=read == "before")
    # Rounding grows with what a chunk forgets: by 1.5 in a kernel's, by 1.2 in the reference's, which is shorter.
    times = dict.fromkeys(expected, 4) if law == "forgetting" else {}
    oracle.judge(functools.partial(run_on, kernels, law=law, read=read), p, expected, kernels.backend, times=times)


@every_law
def test_tf32x3_is_nearly_float32(kernels, law):
    p = problem(2, 37, 0, 40, 36, FLOAT32)
    times = {"cov": 2, "variance": 2, "innovation_var": 2} | dict.fromkeys(("mean", "values", "log_evidence"), 8)
    times = dict.fromkeys(times, 8) if law == "forgetting" else times
    run_so = functools.partial(run_on, kernels, law=law, precision="tf32x3")
    oracle.judge(run_so, p, truth(p, law=law), kernels.backend, times=times)


def test_tf32_is_as_coarse_as_it_says_and_leaves_the_variances_exact(kernels):
    p = problem(2, 17, 0, 40, 36, FLOAT32)
    exact, coarse = (run_on(kernels, p, law="retention", precision=precision) for precision in ("ieee", "tf32"))
    for name in ("mean", "values"):
        assert 1e-5 < oracle.error(coarse[name], exact[name]) / oracle.largest(exact[name]) < 1e-2, name
    assert all(torch.equal(coarse[name], exact[name]) for name in ("cov", "variance", "innovation_var"))


@every_law
def test_a_sequence_may_be_cut_anywhere(kernels, law):
    p = problem(1, 37, 0, 6, 5, FLOAT32, masked=True)
    queries, decay = queries_of(p), decay_of(law, p)
    whole = run_on(kernels, p, law=law)
    for cuts in ([0, 1, 37], [0, 17, 33, 37], [0, 37, 37]):
        state, made = kernels.put(p.state), []
        for first, last in itertools.pairwise(cuts):
            factor = {name: x if name == "prior_var" else x[:, first:last] for name, x in decay.items()}
            part = part_of(p, first, last)
            inputs = kernels.put((part.weights, part.values, queries[:, first:last], part.noise_var))
            options = kernels.put(factor | {"mask": part.mask})
            made.append(filter_posterior(state, *inputs, **options, backend=kernels.backend))
            state = made[-1].state
        oracle.assert_close(state.mean.cpu(), whole["mean"].double(), "mean")
        oracle.assert_close(state.cov.cpu(), whole["cov"].double(), "cov")
        for name in ("values", "variance", "innovation_var"):
            joined = torch.cat([getattr(x, name) for x in made], 1).cpu()
            oracle.assert_close(joined, whole[name].double(), name)


@every_law
def test_each_memory_alone_is_the_memory_in_the_batch(kernels, law):
    p = problem(3, 35, 0, 7, 6, FLOAT32, masked=True)
    together = run_on(kernels, p, law=law)
    alone = run_on(kernels, map_tensors(p, lambda x: x[1:2]), law=law)
    assert all(torch.equal(alone[name], together[name][1:2]) for name in alone)


def test_columns_shared_by_thread_blocks_are_the_same_to_the_last_bit(kernels):
    """A memory alone spreads its columns over more thread blocks than one of four does."""
    p = problem(4, 20, 0, 6, 150, FLOAT32, masked=True)
    together = run_on(kernels, p, law="retention")
    for i in range(4):
        alone = run_on(kernels, map_tensors(p, lambda x, i=i: x[i : i + 1]), law="retention")
        assert all(torch.equal(alone[name], together[name][i : i + 1]) for name in alone)


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@every_law
def test_layout_means_nothing(kernels, layout, law):
    p = problem(2, 5, 0, 7, 6, FLOAT32, masked=True)
    plain, hostile = (run_on(kernels, q, law=law) for q in (p, map_tensors(p, lambda x: poisoned(x, layout))))
    assert all(torch.equal(plain[name], hostile[name]) for name in plain)


@every_law
def test_what_a_masked_step_writes_is_never_read(kernels, law):
    p = problem(3, 19, 0, 6, 5, FLOAT32, masked=True)
    decay, queries = kernels.put(decay_of(law, p)), kernels.put(queries_of(p))

    def made(q):
        q = kernels.put(q)
        inputs = (q.weights, q.values, queries, q.noise_var)
        return filter_posterior(q.state, *inputs, **decay, mask=q.mask, backend=kernels.backend)

    hidden = ~p.mask.unsqueeze(-1)
    nan = {name: getattr(p, name).masked_fill(hidden, torch.nan) for name in ("weights", "values")}
    assert oracle.equal(made(p), made(p._replace(**nan)))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@every_law
def test_low_precision_codes_are_read_as_they_are(kernels, low, law):
    p = problem(2, 5, 0, 8, 8, FLOAT32)
    q = p._replace(weights=p.weights.to(low), values=p.values.to(low))
    queries, decay = queries_of(q).to(low), kernels.put(decay_of(law, p))

    def made(q, queries):
        q = kernels.put(q)
        inputs = (q.weights, q.values, kernels.put(queries), q.noise_var)
        return filter_posterior(q.state, *inputs, **decay, backend=kernels.backend)

    wide = map_tensors(q, lambda x: x.float() if x.is_floating_point() else x)
    assert oracle.equal(made(q, queries), made(wide, queries.float()))


@pytest.mark.parametrize("shape", oracle.EMPTY_SHAPES, ids=str)
@every_law
def test_empty_axes(kernels, shape, law):
    p = problem(*shape, FLOAT32)
    expected = oracle.flat(run(p, "reference", law=law))
    for name, x in run_on(kernels, p, law=law).items():
        oracle.assert_close(x, expected[name].double(), name)


def test_forgetting_loses_no_digits(kernels):
    """The memory is the regression with the weights γ^(T−t): a chunk of 32 steps would round at 0.7^(−32) of it."""
    p = problem(2, 32, 0, 3, 5, FLOAT32)
    p = p._replace(noise_var=torch.full_like(p.noise_var, 20 * (1 / 0.7 - 1)))
    exact = truth(map_tensors(p, widened), law="forgetting")
    found = run_on(kernels, p, law="forgetting")
    for name in ("mean", "cov"):
        scale = 64 * torch.finfo(FLOAT32).eps * oracle.largest(exact[name])
        assert oracle.error(found[name], exact[name]) <= scale, name


# ---- what is refused -----------------------------------------------------------------------------------------------


def refused(kernels, p, words, **options):
    with pytest.raises(torch.linalg.LinAlgError, match=words):
        run(kernels.put(p), kernels.backend, **options)


def test_a_covariance_that_is_none_is_named(kernels):
    p = problem(3, 6, 0, 5, 4, FLOAT32)
    asymmetric, negative = p.state.cov.clone(), p.state.cov.clone()
    asymmetric[1, 0] += 1
    negative[2] *= -1
    refused(kernels, p._replace(state=MemoryState(p.state.mean, asymmetric)), r"not symmetric in memory \[1\]")
    refused(kernels, p._replace(state=MemoryState(p.state.mean, negative)), r"not positive definite in memory \[2\]")


def test_a_covariance_is_held_or_refused(kernels):
    """wᵀUw/σ² of 1/(512 eps) is held, and of 2/eps it is refused."""
    eps = torch.finfo(FLOAT32).eps
    weights = torch.zeros(2, 17, 3)
    weights[1, :, 0] = 1
    state = kernels.put(MemoryState(torch.zeros(2, 3, 2), torch.eye(3).repeat(2, 1, 1)))
    inputs = kernels.put((weights, torch.zeros(2, 17, 2), weights))
    after = filter_posterior(state, *inputs, 512 * eps, backend=kernels.backend).state
    assert (after.cov.diagonal(dim1=1, dim2=2) > 0).all()
    with pytest.raises(torch.linalg.LinAlgError, match=r"lost to rounding in memory \[1\]"):
        filter_posterior(state, *inputs, eps / 2, backend=kernels.backend)


def test_forgetting_out_of_range_is_named(kernels):
    p = problem(2, 40, 0, 5, 4, FLOAT32)
    p.weights[0] = 0
    forgetting = torch.ones(2, 40)
    forgetting[0] = 0.05
    refused(kernels, p, r"beyond the range of its dtype in memory \[0\]", forgetting=kernels.put(forgetting))


# ---- gradients -----------------------------------------------------------------------------------------------------


def judge_gradient(kernels, p, **options):
    """Errors are at most three times those of the reference in float32; the truth is the reference in float64."""
    expected = gradients(map_tensors(p, widened), "reference", **options)
    own = gradients(p, "reference", **options)
    found = gradients(kernels.put(p), kernels.backend, **options)
    for name, exact in expected.items():
        wrong, scale = oracle.error(found[name].cpu(), exact), oracle.largest(exact)
        bound = 3 * (oracle.error(own[name], exact) + 4 * torch.finfo(FLOAT32).eps * scale)
        assert wrong <= bound, f"{name}: error {wrong:.3g} exceeds {bound:.3g}"


@every_case
@every_law
def test_gradients(kernels, shape, masked, law, read):
    judge_gradient(kernels, problem(*shape, FLOAT32, masked=masked), law=law, read=read)


@pytest.mark.parametrize(("output", "law"), list(zip(OUTPUTS, 2 * LAWS, strict=True)))
def test_the_gradient_of_each_output_alone(kernels, law, output):
    p = problem(2, 19, 0, 6, 5, FLOAT32, masked=True)
    judge_gradient(kernels, p, law=law, outputs=[output])


def test_a_memory_that_forgets_most_at_every_step_has_its_gradient(kernels):
    """Every chunk is one step."""
    p = problem(1, 35, 0, 4, 3, FLOAT32)
    p = p._replace(noise_var=torch.full_like(p.noise_var, 30))
    assert (decay_of("forgetting", p)["forgetting"] < 0.5).all()
    judge_gradient(kernels, p, law="forgetting")


@pytest.mark.parametrize("law", ["retention", "forgetting"])
def test_workspace_of_a_gradient_is_a_tenth_of_what_the_loop_keeps(law):
    """Under autograd the loop keeps at least the memory that every step reads, K (K + C) numbers."""
    pytest.importorskip("triton")
    from fastkm._linalg.triton.launch import evaluate_layout
    from fastkm.filtering.triton.backward import memories_of
    from fastkm.filtering.triton.chunk_backward import filter_backward_layout
    from fastkm.filtering.triton.forward import chunk_of

    for T, K, C in ((1024, 64, 64), (2048, 64, 64), (4096, 64, 64), (2048, 128, 128)):
        memories = memories_of(T, chunk_of(T), law == "forgetting")
        kept = evaluate_layout(filter_backward_layout, K, C, memories, chunk_of(T)).end
        assert 10 * kept <= T * K * (K + C)
