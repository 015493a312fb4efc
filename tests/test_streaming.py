"""Streams: what the functions do pattern by pattern, in place, for as long as one likes."""

import oracle
import pytest
import torch
from oracle import problem

import fastkm
from fastkm import MemoryState, MemoryStream
from fastkm._runtime import schema, status
from fastkm.streaming.api import OPERATIONS

NATIVE_MISSING = pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
# One number alone may be right by luck, so there are many.
SHAPES = [(32, 1, 1, 1, 1), *oracle.SHAPES[1:]]


def double(p):
    return oracle.map_tensors(p, lambda x: x.double() if x.is_floating_point() else x)


def noise_of(p):
    return p.noise_var[:, 0] if p.noise_var.shape[1] else 1.0


def stream_of(p, backend, **options):
    return MemoryStream(p.state, noise_of(p), p.ridge, backend=backend, **options)


def write(p, backend, **options):
    """What a stream gives for an episode, as the function gives it."""
    stream = stream_of(p, backend, **options)
    got = stream.write(p.values, mask=p.mask)
    return fastkm.WriteResult(stream.state, *got)


def update(p, backend):
    stream = stream_of(p, backend)
    got = stream.update(p.weights, p.values, mask=p.mask)
    return fastkm.PosteriorUpdate(stream.state, *got)


def true_write(p, num_opt_iters=1):
    p = double(p)
    options = {"mask": p.mask, "num_opt_iters": num_opt_iters, "backend": "reference"}
    return oracle.flat(fastkm.write(p.state, p.values, noise_of(p), p.ridge, **options))


def true_update(p):
    p = double(p)
    return oracle.flat(
        fastkm.update_posterior(p.state, p.weights, p.values, noise_of(p), mask=p.mask, backend="reference")
    )


@pytest.mark.parametrize("num_opt_iters", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_stream_writes_as_the_function_does(shape, num_opt_iters, backend, dtype):
    p = problem(*shape, dtype, masked=True)
    run = lambda p, b: write(p, b, num_opt_iters=num_opt_iters)  # noqa: E731
    oracle.judge(run, p, true_write(p, num_opt_iters), backend)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_stream_updates_as_the_function_does(shape, backend, dtype):
    p = problem(*shape, dtype, masked=True)
    oracle.judge(update, p, true_update(p), backend)


@pytest.mark.parametrize("num_iters", [1, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_stream_reads_as_the_function_does(shape, num_iters, backend, dtype):
    p = problem(*shape, dtype)

    def run(p, backend):
        stream = stream_of(p, backend)
        stream.write(p.values)
        return stream.read(p.queries, num_iters)

    exact = double(p)
    written = fastkm.write(exact.state, exact.values, noise_of(exact), exact.ridge, backend="reference").state.mean
    truth = fastkm.read(written, exact.queries, exact.ridge, num_iters=num_iters, backend="reference")
    oracle.judge(run, p, oracle.flat(truth), backend)


def test_one_call_is_many_calls_to_the_last_bit(backend, dtype):
    p = problem(3, 9, 2, 17, 12, dtype)
    whole, parts = stream_of(p, backend), stream_of(p, backend)
    together = whole.write(p.values)
    one_by_one = [parts.write(z) for z in p.values.split(1, 1)]
    for name, x in together._asdict().items():
        assert torch.equal(x, torch.cat([getattr(part, name) for part in one_by_one], 1)), name
    assert oracle.equal(whole.state, parts.state)


@NATIVE_MISSING
@pytest.mark.parametrize(("K", "C"), [(70, 33), (300, 250)])
def test_the_number_of_threads_changes_no_bit(K, C, dtype):
    p, results = problem(1, 5, 2, K, C, dtype), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(write(p, "native", num_opt_iters=2))
    assert all(oracle.equal(results[0], other) for other in results[1:])


def test_a_memory_alone_is_the_memory_in_the_batch(dtype):
    p = problem(4, 6, 2, 21, 10, dtype)
    backend = "native" if schema.unavailable is None else "reference"
    whole = oracle.flat(write(p, backend))
    alone = oracle.flat(write(oracle.map_tensors(p, lambda x: x[2:3]), backend))
    for name, x in alone.items():
        if backend == "native":
            assert torch.equal(x, whole[name][2:3]), name
        else:
            oracle.assert_close(x, whole[name][2:3].double(), name)


def test_covariance_and_inverse_stay_symmetric_to_the_last_bit(backend, dtype):
    p = problem(2, 60, 2, 19, 12, dtype)
    stream = stream_of(p, backend)
    stream.write(p.values)
    for x in (stream.state.cov, stream.state_dict()["inverse"]):
        assert torch.equal(x, x.mT)


def test_the_carried_inverse_follows_the_memory(backend):
    """(R Rᵀ + λI) H = I up to rounding after any number of patterns, without having been computed anew."""
    p = problem(3, 200, 2, 23, 31)
    stream = stream_of(p, backend)
    stream.write(p.values)
    held, ridge = stream.state_dict(), torch.diag_embed(p.ridge.unsqueeze(-1).expand(3, 23))
    gap = (held["mean"] @ held["mean"].mT + ridge) @ held["inverse"] - torch.eye(23)
    assert stream.refreshes.tolist() == [0, 0, 0]
    assert oracle.largest(gap) < 1e-9


def test_ten_thousand_patterns_later(backend):
    """The stream is still as good as the functions, called pattern by pattern. The command for a million is
    ``python -m benchmarks.streams --patterns 1000000``.
    """
    if backend == "reference":
        pytest.skip("minutes in plain PyTorch")
    p, generator = problem(1, 0, 0, 8, 12, torch.float32), torch.Generator().manual_seed(1)
    values = torch.randn(1, 10_000, 12, generator=generator)
    stream = MemoryStream(p.state, 1.0, 1.0, backend=backend)
    state, truth = p.state, MemoryState(*(x.double() for x in p.state))
    for z in values.split(100, 1):
        stream.write(z)
        for one in z.split(1, 1):
            state = fastkm.write(state, one, 1.0, 1.0, backend=backend).state
        truth = fastkm.write(truth, z.double(), 1.0, 1.0, backend=backend).state
    for name, got, own, exact in zip(("mean", "cov"), stream.state, state, truth, strict=True):
        allowed = 2 * (oracle.error(own, exact) + torch.finfo(torch.float32).eps * oracle.largest(exact))
        assert oracle.error(got, exact) <= allowed, name


# K, C, T, σ², λ, the distance between patterns (0: they have none in common), and the scale of memory and patterns.
HARD = [
    (63, 2, 5, 28.0, 1e-3, 0.0, 1.0),
    (32, 8, 20, 1.0, 1e-4, 0.0, 1.0),
    (16, 20, 30, 1.0, 1e-4, 0.0, 1.0),
    (64, 64, 60, 1.0, 1e-3, 0.0, 1.0),
    (32, 40, 40, 1e-2, 1e-2, 0.01, 1.0),
    (32, 40, 40, 1e-4, 1e-4, 0.01, 1.0),
    (20, 30, 50, 1.0, 1.0, 0.0, 100.0),
    (20, 30, 50, 1.0, 1.0, 0.0, 0.01),
]


@pytest.mark.parametrize(("K", "C", "T", "noise_var", "ridge", "distance", "scale"), HARD)
def test_hard_problems_keep_the_digits_of_the_literal_loop(K, C, T, noise_var, ridge, distance, scale, backend):
    """Small ridges, near duplicates, large and small scales, in float32."""
    generator = torch.Generator().manual_seed(0)
    mean, values = torch.randn(1, K, C, generator=generator), torch.randn(1, T, C, generator=generator)
    if distance:
        values = torch.randn(1, 1, C, generator=generator) + distance * values
    state, queries = MemoryState(scale * mean, torch.eye(K).unsqueeze(0)), torch.randn(1, 3, C, generator=generator)

    def loop(dtype):
        given = MemoryState(*(x.to(dtype) for x in state))
        written = fastkm.write(given, scale * values.to(dtype), noise_var, ridge, backend="reference")
        return written, fastkm.read(written.state.mean, queries.to(dtype), ridge, num_iters=3, backend="reference")

    stream = MemoryStream(state, noise_var, ridge, backend=backend)
    got = fastkm.WriteResult(stream.state, *stream.write(scale * values)), stream.read(queries, 3)
    for result, own, truth in zip(got, loop(torch.float32), loop(torch.float64), strict=True):
        truth = oracle.flat(truth)
        errors = {name: oracle.error(x, truth[name]) for name, x in oracle.flat(own).items()}
        for name, x in oracle.flat(result).items():
            allowed = 2 * (errors[name] + 4 * torch.finfo(torch.float32).eps * max(oracle.largest(truth[name]), 1))
            assert oracle.error(x, truth[name]) <= allowed, name


def test_what_no_inverse_in_this_dtype_serves_is_refused(backend):
    """R Rᵀ is 10⁷ times the ridge: float32 holds no inverse that corrections could start from."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(1, 63, 2, generator=generator)
    stream = MemoryStream(MemoryState(mean, torch.eye(63).unsqueeze(0)), 28.0, 1e-5, backend=backend)
    before = stream.state.mean.clone()
    refused = 0
    for value in torch.randn(20, 1, 1, 2, generator=generator):
        try:
            stream.write(value)
        except torch.linalg.LinAlgError as error:
            assert "a larger ridge" in str(error)  # noqa: PT017  some are written
            refused += 1
            assert torch.equal(stream.state.mean, before)
        before = stream.state.mean.clone()
    assert refused > 0


def test_an_inverse_that_does_not_serve_is_computed_anew(backend, dtype):
    """A wrong inverse costs time, never digits: its residual shows it."""
    p = problem(2, 4, 3, 11, 9, dtype)
    sick, sound = stream_of(p, backend), stream_of(p, backend)
    sick._inverse[1] *= 1.7
    got, expected = sick.write(p.values), sound.write(p.values)
    assert sick.refreshes.tolist() == [0, 1]
    for name, x in got._asdict().items():
        oracle.assert_close(x, getattr(expected, name).double(), name)
    sick._inverse[1] *= 1.7
    oracle.assert_close(sick.read(p.queries).values, sound.read(p.queries).values.double())
    assert sick.refreshes.tolist()[1] == 2


def test_nothing_of_the_caller_changes(backend, dtype):
    p = problem(2, 4, 3, 5, 6, dtype)
    before = oracle.map_tensors(p, torch.clone)
    stream = stream_of(p, backend)
    stream.write(p.values), stream.update(p.weights, p.values), stream.read(p.queries)
    assert all(map(torch.equal, oracle.tensors(p), oracle.tensors(before)))


def test_a_stream_lives_in_inference_mode(backend):
    p = problem(2, 4, 3, 5, 6)
    with torch.inference_mode():
        stream = stream_of(p, backend)
        got = stream.write(p.values)
    assert oracle.equal(got, stream_of(p, backend).write(p.values))


def test_autograd_notices_that_the_memory_has_changed(backend):
    p = problem(2, 4, 3, 5, 6)
    stream, scale = stream_of(p, backend), torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = (scale * stream.state.mean).square().sum()
    stream.write(p.values)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_state_is_what_the_stream_changes(backend):
    p = problem(2, 4, 3, 5, 6)
    stream = stream_of(p, backend)
    state = stream.state
    before = MemoryState(*(x.clone() for x in state))
    stream.write(p.values)
    assert oracle.equal(state, stream.state)
    assert not oracle.equal(state, before)


def test_a_saved_stream_goes_on_with_the_same_bits(backend, tmp_path):
    p = problem(2, 9, 3, 13, 6, torch.float32)
    stream, other = stream_of(p, backend), MemoryStream(p.state, 3.0, 4.0, backend=backend)
    stream.write(p.values[:, :5])
    torch.save(stream.state_dict(), tmp_path / "stream.pt")
    other.load_state_dict(torch.load(tmp_path / "stream.pt", weights_only=True))
    assert oracle.equal(stream.write(p.values[:, 5:]), other.write(p.values[:, 5:]))
    assert oracle.equal(stream.state, other.state)


@pytest.mark.parametrize("change", ["a key less", "another shape", "another dtype", "no tensor"])
def test_a_state_that_is_not_of_this_stream_is_refused(change):
    p = problem(2, 3, 3, 5, 6)
    stream = MemoryStream(p.state, 1.0, 1.0)
    held = stream.state_dict()
    before = stream.state_dict()
    if change == "a key less":
        del held["inverse"]
    else:
        wrong = {"another shape": held["cov"][:1], "another dtype": held["cov"].float(), "no tensor": 1.0}[change]
        held["cov"] = wrong
    held["mean"] = held["mean"] + 1
    with pytest.raises((KeyError, ValueError), match="state_dict"):
        stream.load_state_dict(held)
    assert all(torch.equal(before[name], x) for name, x in stream.state_dict().items())


# ---------------------------------------------------------------------------------------------------- what is refused


def test_a_refused_pattern_changes_nothing_and_the_others_are_written(backend, dtype):
    p = problem(2, 6, 3, 7, 5, dtype)
    sick, sound = stream_of(p, backend), stream_of(p, backend)
    values, mask = p.values.clone(), torch.ones(2, 6, dtype=torch.bool)
    values[1, 2, 3], mask[1, 2] = torch.nan, False
    with pytest.raises(torch.linalg.LinAlgError, match=r"values are not finite in patterns \[\[1, 2\]\]"):
        sick.write(values)
    sound.write(p.values, mask=mask)
    assert oracle.equal(sick.state, sound.state)
    assert torch.equal(sick.state_dict()["inverse"], sound.state_dict()["inverse"])


def test_a_covariance_that_is_not_positive_definite_is_refused(backend):
    mean, cov = torch.ones(1, 2, 3), torch.diag_embed(torch.tensor([[1.0, -4.0]]))
    stream = MemoryStream(MemoryState(mean, cov), 1.0, 1.0, backend=backend)
    before = stream.state_dict()
    with pytest.raises(torch.linalg.LinAlgError, match=r"not positive definite by patterns \[\[0, 0\]\]"):
        stream.update(torch.tensor([[[0.0, 1.0]]]), torch.ones(1, 1, 3))
    assert all(torch.equal(before[name], x) for name, x in stream.state_dict().items())


def test_noise_too_small_for_the_dtype_is_refused(backend):
    p = problem(1, 1, 1, 4, 6, torch.float32)
    stream = MemoryStream(p.state, 1e-12, 1.0, backend=backend)
    before = stream.state_dict()
    with pytest.raises(torch.linalg.LinAlgError, match="lost to rounding"):
        stream.update(p.weights, p.values)
    assert all(torch.equal(before[name], x) for name, x in stream.state_dict().items())


def test_a_memory_that_cannot_be_factored_is_refused_at_once(backend):
    mean = torch.full((2, 3, 4), 1.0)
    mean[1] = 1e25
    with pytest.raises(torch.linalg.LinAlgError, match=r"ridge I is not positive definite in memory \[1\]"):
        MemoryStream(MemoryState(mean, torch.eye(3).repeat(2, 1, 1)), 1.0, 1.0, backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"state": 1}, TypeError, "state must be a MemoryState"),
        ({"noise_var": 0.0}, ValueError, "noise_var must be positive"),
        ({"ridge": torch.ones(3).double()}, ValueError, "ridge must be a float or a tensor of shape"),
        ({"num_opt_iters": 0}, ValueError, "num_opt_iters must be at least 1"),
        ({"backend": "triton"}, fastkm.BackendUnavailableError, "there is no triton kernel for stream"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_wrong_settings_are_refused_in_words(change, error, words):
    p = problem(2, 3, 3, 5, 6)
    given = {"state": p.state, "noise_var": 1.0, "ridge": 1.0} | change
    with pytest.raises(error, match=words):
        MemoryStream(given.pop("state"), given.pop("noise_var"), given.pop("ridge"), **given)


def test_an_asymmetric_covariance_is_refused(backend):
    p = problem(2, 3, 3, 5, 6)
    p.state.cov[1, 0, 1] += 1
    with pytest.raises(torch.linalg.LinAlgError, match=r"state.cov is not symmetric in memory \[1\]"):
        stream_of(p, backend)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda s: s.write(torch.zeros(2, 3, 7)), ValueError, r"values must have shape .* got \[2, 3, 7\]"),
        (lambda s: s.write(torch.zeros(3, 3, 6)), ValueError, "values must have shape"),
        (lambda s: s.write(torch.zeros(2, 3, 6).double()), TypeError, "values must be float32"),
        (lambda s: s.write([1.0]), TypeError, "values must be a tensor"),
        (lambda s: s.write(torch.zeros(2, 3, 6), mask=torch.ones(2, 3)), TypeError, "mask must be a bool tensor"),
        (lambda s: s.update(torch.zeros(2, 3, 4), torch.zeros(2, 3, 6)), ValueError, "weights must have shape"),
        (lambda s: s.update(torch.zeros(2, 3, 5), torch.zeros(2, 4, 6)), ValueError, "values must have shape"),
        (lambda s: s.read(torch.zeros(2, 3, 7)), ValueError, "queries must have shape"),
        (lambda s: s.read(torch.zeros(2, 3, 6), 0), ValueError, "num_iters must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused_in_words_and_change_nothing(call, error, words):
    stream = MemoryStream(problem(2, 3, 3, 5, 6, torch.float32).state, 1.0, 1.0)
    before = stream.state_dict()
    with pytest.raises(error, match=words):
        call(stream)
    assert all(torch.equal(before[name], x) for name, x in stream.state_dict().items())


def test_a_tensor_that_requires_a_gradient_is_refused_unless_autograd_is_off(backend):
    p = problem(2, 3, 3, 5, 6)
    stream = stream_of(p, backend)
    values, queries = p.values.clone().requires_grad_(), p.queries.clone().requires_grad_()
    for call in (lambda: stream.write(values), lambda: stream.update(p.weights, values), lambda: stream.read(queries)):
        with pytest.raises(RuntimeError, match="a stream computes no gradients"):
            call()
        with torch.no_grad():
            call()
    state = MemoryState(p.state.mean.clone().requires_grad_(), p.state.cov)
    with pytest.raises(RuntimeError, match="a stream computes no gradients"):
        MemoryStream(state, 1.0, 1.0, backend=backend)


def test_codes_of_low_precision_stand_beside_a_float32_memory(backend):
    p = problem(2, 3, 3, 5, 6, torch.float32)
    low, wide = stream_of(p, backend), stream_of(p, backend)
    values = p.values.bfloat16()
    assert oracle.equal(low.write(values), wide.write(values.float()))
    assert oracle.equal(low.read(values), wide.read(values.float()))


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 5), (2, 0, 2, 4, 5), (2, 3, 0, 4, 5), (2, 3, 2, 4, 0)], ids=str)
def test_nothing_is_a_stream_too(shape, backend, dtype):
    p = problem(*shape, dtype)
    stream = stream_of(p, backend)
    assert stream.write(p.values).weights.shape == (shape[0], shape[1], shape[3])
    assert stream.update(p.weights, p.values).kl.shape == shape[:2]
    assert stream.read(p.queries).values.shape == (shape[0], shape[2], shape[4])


def test_a_memory_of_zeros_stays_one(backend):
    """Its weights are zero, so nothing is written."""
    stream = MemoryStream(MemoryState(torch.zeros(1, 3, 4), torch.eye(3).unsqueeze(0)), 1.0, 1.0, backend=backend)
    stream.write(torch.randn(1, 5, 4))
    assert not stream.state.mean.any()
    assert torch.equal(stream.state.cov[0], torch.eye(3))
    assert stream.refreshes.tolist() == [0]


# ---------------------------------------------------------------------------------------------------- the operators


def operator_arguments(dtype=torch.float64):
    p = problem(2, 3, 3, 5, 6, dtype)
    stream = MemoryStream(p.state, 1.0, 1.0, backend="reference")
    memory = stream._mean, stream._cov, stream._inverse, stream._refreshes
    return {
        "stream_patterns": (*memory, None, p.values, stream.noise_var, stream.ridge, 1, None),
        "refresh_streams": (stream._mean, stream._inverse, stream.ridge),
    }


@NATIVE_MISSING
@pytest.mark.parametrize("name", ["stream_patterns", "refresh_streams"])
def test_opcheck(name, dtype):
    operator = getattr(torch.ops.fastkm, name).default
    assert operator._schema.is_mutable
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, operator_arguments(dtype)[name], test_utils=checks)


@NATIVE_MISSING
@pytest.mark.parametrize("change", ["not padded", "other rows", "not contiguous", "other dtype"])
def test_the_operator_refuses_matrices_that_are_not_of_a_stream(change):
    mean, cov, *rest = operator_arguments()["stream_patterns"]
    wrong = {
        "not padded": lambda x: x[..., :5].contiguous(),
        "other rows": lambda x: x[:, :4].contiguous(),
        "not contiguous": lambda x: x.mT.contiguous().mT,
        "other dtype": lambda x: x.float(),
    }[change]
    with pytest.raises(RuntimeError, match="fastkm"):
        torch.ops.fastkm.stream_patterns(mean, wrong(cov), *rest)


def test_both_backends_have_the_same_operators():
    assert all(len(operators) == 2 for operators in OPERATIONS.values())
    assert set(status.WORDS) >= {1, 2, 3}
