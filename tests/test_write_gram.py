"""The write of inner products: what it equals, what it refuses, and the instruction sets that it is built for."""

import oracle
import pytest
import torch
from oracle import EMPTY_SHAPES, SHAPES, problem

import fastkm
from fastkm._runtime import schema
from fastkm._runtime.status import ASYMMETRIC, NOT_POSITIVE_DEFINITE
from fastkm.writing import reference

pytestmark = pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
NAMES = "cov", "weights", "innovation_var", "kl"
LARGE = [(1, 5, 1, 530, 600), (1, 70, 1, 130, 300)]  # half of a matrix is read; patterns go in several chunks


def given(p, num_opt_iters=1):
    rows = torch.cat((p.state.mean, p.values), 1)
    return rows @ rows.mT, p.state.cov, p.noise_var, p.ridge, p.values.shape[-1], num_opt_iters, p.mask


def written(p, num_opt_iters=1):
    return torch.ops.fastkm.write_gram(*given(p, num_opt_iters))


def truth_of(p, num_opt_iters=1):
    made = fastkm.write(
        p.state, p.values, p.noise_var, p.ridge, num_opt_iters=num_opt_iters, mask=p.mask, backend="reference"
    )
    return made.state.cov, made.weights, made.innovation_var, made.kl


def scale_of(name, p):
    return max(1.0, float(p.values.shape[-1]) if name == "kl" else oracle.largest(p.values))


@pytest.mark.parametrize("form", ["native", "reference"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_opt_iters", [1, 3])
@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY_SHAPES, LARGE[1]], ids=str)
def test_it_is_the_literal_write(shape, num_opt_iters, masked, form):
    p = problem(*shape, masked=masked)
    *found, pivots, info = (
        written(p, num_opt_iters) if form == "native" else reference.write_gram(*given(p, num_opt_iters))
    )
    assert not info.any()
    for name, x, expected in zip(NAMES, found, truth_of(p, num_opt_iters), strict=True):
        oracle.assert_close(x, expected, f"{form} {name}", scale=scale_of(name, p))
    gram, K = given(p)[0], shape[3]
    if masked:
        gram = gram.clone()
        read = torch.nn.functional.pad(p.mask, (K, 0), value=True)
        gram *= read.unsqueeze(-1) * read.unsqueeze(-2)
    system = gram + torch.diag_embed(p.ridge.unsqueeze(-1).expand(gram.shape[:2]))
    exact = torch.linalg.cholesky(system).diagonal(dim1=-2, dim2=-1).square()
    if shape[1]:
        oracle.assert_close(pivots, exact, "pivots", scale=max(1.0, oracle.largest(gram)))
    assert pivots.shape == exact.shape
    assert pivots.isfinite().all()


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_every_instruction_set_and_number_of_threads_computes_it(shape, level):
    """A memory of which half is read, by 1 and by 2 threads, bit by bit alike."""
    p = problem(*shape)
    threads = torch.get_num_threads()
    try:
        if torch.ops.fastkm.select_cpu_level(level) != level:
            pytest.skip("this processor lacks it, or it is not built")
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(written(p))
    finally:
        torch.set_num_threads(threads)
        torch.ops.fastkm.select_cpu_level(2)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    for name, x, expected in zip(NAMES, results[0], truth_of(p), strict=False):
        oracle.assert_close(x, expected, name, scale=scale_of(name, p))


@pytest.mark.parametrize("shape", [(16, 17, 1, 8, 64), (8, 33, 1, 31, 97), (2, 40, 1, 16, 200)], ids=str)
def test_float32_is_as_exact_as_the_literal_write(shape):
    """Twice the error of the literal loop in float32, and what the rounding of the products moves.

    ``Y Yᵀ`` is rounded by u times its diagonal; along with u ‖Z‖² the KL moves by the energy of an innovation, and the
    others by u times the ratio of the largest entry of the system to its least pivot.
    """
    p = problem(*shape)
    narrow = oracle.map_tensors(p, torch.Tensor.float)
    exact = oracle.map_tensors(narrow, torch.Tensor.double)
    *found, pivots, info = written(narrow)
    assert not info.any()
    ratio = (given(exact)[0].diagonal(dim1=-2, dim2=-1).amax() + exact.ridge.amax()) / pivots.double().amin()
    literal = truth_of(narrow)
    for name, x, alone, expected in zip(NAMES, found, literal, truth_of(exact), strict=True):
        moved = torch.finfo(torch.float32).eps * ratio.item() * max(1.0, oracle.largest(expected), scale_of(name, p))
        assert oracle.error(x, expected) <= 2 * oracle.error(alone, expected) + moved, name


def test_what_a_masked_pattern_holds_is_not_read():
    p = problem(3, 9, 1, 6, 40, masked=True)
    expected = written(p)
    gram, *rest = given(p)
    rows = torch.nn.functional.pad(~p.mask, (6, 0))
    poisoned = gram.masked_fill(rows.unsqueeze(-1) | rows.unsqueeze(-2), torch.nan)
    assert all(torch.equal(x, y) for x, y in zip(torch.ops.fastkm.write_gram(poisoned, *rest), expected, strict=True))


def test_the_status_names_what_is_wrong():
    gram, cov, *rest = given(problem(3, 4, 1, 5, 40))
    cov[0, 0, 1] += 0.3
    gram[1, :5, :5] -= 100 * torch.eye(5, dtype=gram.dtype)
    *_, pivots, info = torch.ops.fastkm.write_gram(gram, cov, *rest)
    assert info.tolist() == [ASYMMETRIC, NOT_POSITIVE_DEFINITE, 0]
    assert (pivots[1] == 0).all()  # no digits hold it
    assert (pivots[::2] > 0).all()


def test_what_does_not_fit_is_refused():
    gram, cov, noise_var, ridge, columns, count, mask = given(problem(2, 3, 1, 4, 9))
    cases = [
        (gram[:, :3, :3], cov, noise_var, ridge, columns, count, mask),
        (gram[:, :6], cov, noise_var, ridge, columns, count, mask),
        (gram.float(), cov, noise_var, ridge, columns, count, mask),
        (gram, cov[:, :3], noise_var, ridge, columns, count, mask),
        (gram, cov, noise_var[:, :2], ridge, columns, count, mask),
        (gram, cov, -noise_var, ridge, columns, count, mask),
        (gram, cov, noise_var, ridge[:1], columns, count, mask),
        (gram, cov, noise_var, ridge, -1, count, mask),
        (gram, cov, noise_var, ridge, columns, 0, mask),
        (gram, cov, noise_var, ridge, columns, count, torch.ones(2, 4, dtype=torch.bool)),
    ]
    for arguments in cases:
        with pytest.raises(RuntimeError):
            torch.ops.fastkm.write_gram(*arguments)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], *EMPTY_SHAPES], ids=str)
def test_opcheck(shape, dtype):
    p = problem(*shape, dtype, masked=True)
    torch.library.opcheck(torch.ops.fastkm.write_gram.default, given(p), test_utils=("test_schema", "test_faketensor"))


def test_the_gradient_of_a_write_reads_half_of_a_large_matrix():
    """The backward of a write goes through the same products; the truth is autograd through the literal loop."""
    p = problem(1, 3, 1, 520, 12)

    def gradients(backend):
        leaves = [x.clone().requires_grad_() for x in (*p.state, p.values)]
        made = fastkm.write(fastkm.MemoryState(*leaves[:2]), leaves[2], p.noise_var, p.ridge, backend=backend)
        loss = made.weights.square().sum() + made.kl.sum() + made.state.mean.square().sum()
        mean, cov, values = torch.autograd.grad(loss, leaves)
        return mean, cov + cov.mT, values

    truth = gradients("reference")
    scale = max(map(oracle.largest, truth))
    for got, expected in zip(gradients("native"), truth, strict=True):
        oracle.assert_close(got, expected, "gradient", scale=scale)
