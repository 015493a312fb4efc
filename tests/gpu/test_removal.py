"""remove_patterns and replace_patterns on the GPU kernels: the inverse of an update, and what was never written."""

import numpy as np
import oracle
import pytest
import torch
from oracle import map_tensors, poisoned, problem

from fastkm import MemoryState, remove_patterns, replace_patterns, update_posterior
from gpu.support import SHAPES, only_with_kernels, outputs, widened

OPERATIONS = ["remove_patterns", "replace_patterns"]
CASES = [*SHAPES, (1, 3, 0, 130, 8)]  # and a memory that CUDA factors in a launch of its own
HELD = 0.05  # of the patterns of a problem, which any memory holds


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_equals_the_definition(kernels, operation, shape, masked):
    p = problem(*shape, torch.float32, masked=masked)
    kernels.judge(operation, p, outputs(operation, map_tensors(p, widened), "reference"))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients(kernels, operation, shape, masked):
    kernels.judge_gradient(operation, problem(*shape, torch.float32, masked=masked))


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_removal_undoes_an_update(kernels, shape):
    """The error is that of the rounding of U, at most ``(1 + x)²`` times as large; here ``x ≤ wᵀUw / σ²``."""
    only_with_kernels(kernels, "remove_patterns")
    p = kernels.put(problem(*shape, torch.float32))
    patterns = 0.3 * p.weights, p.values, p.noise_var
    written = update_posterior(p.state, *patterns, backend=kernels.backend).state
    back = remove_patterns(written, *patterns, backend=kernels.backend)
    x = ((patterns[0] @ p.state.cov) * patterns[0]).sum(-1) / p.noise_var
    bound = 8 * (shape[3] + 16) * torch.finfo(torch.float32).eps * float((1 + x).max()) ** 2
    for got, before in zip(back, p.state, strict=True):
        assert oracle.error(got.cpu(), before.double().cpu()) <= bound * max(1.0, oracle.largest(before.cpu()))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_memory_alone_is_the_memory_in_the_batch(kernels, operation):
    p = problem(3, 5, 0, 7, 6, torch.float32, masked=True)
    together = kernels.call(operation, p)
    alone = kernels.call(operation, map_tensors(p, lambda x: x[1:2]))
    assert all(torch.equal(alone[name], together[name][1:2]) for name in alone)


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_layout_means_nothing(kernels, operation, layout):
    p = problem(2, 5, 0, 7, 6, torch.float32, masked=True)
    plain, hostile = (kernels.call(operation, q) for q in (p, map_tensors(p, lambda x: poisoned(x, layout))))
    assert all(torch.equal(plain[name], hostile[name]) for name in plain)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_a_masked_pattern_holds_is_never_read(kernels, operation):
    p = problem(3, 5, 0, 6, 5, torch.float32, masked=True)
    p = p._replace(mask=p.mask & p.mask.flip(1))  # of a replacement, the new weights are the old ones from the last on
    masked = ~p.mask.unsqueeze(-1)
    q = p._replace(weights=p.weights.masked_fill(masked, np.nan), values=p.values.masked_fill(masked, np.nan))
    plain, hostile = (kernels.call(operation, x) for x in (p, q))
    assert all(torch.equal(plain[name], hostile[name]) for name in plain)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_codes_are_read_as_they_are(kernels, low):
    """Also where the patterns that leave have another type than those that come."""
    only_with_kernels(kernels, "remove_patterns")
    p = kernels.put(problem(2, 5, 0, 7, 6, torch.float32))
    weights, values = (HELD * p.weights).to(low), p.values.to(low)
    for old, new in (((weights, values), ()), ((weights, values), (p.weights, p.values))):
        function = replace_patterns if new else remove_patterns
        narrow, wide = (
            function(p.state, *codes, *new, p.noise_var, backend=kernels.backend)
            for codes in (old, [x.float() for x in old])
        )
        assert all(map(torch.equal, narrow, wide))


@pytest.mark.parametrize("shape", oracle.EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_empty_axes(kernels, operation, shape):
    p = problem(*shape, torch.float32)
    expected = kernels.call(operation, p, "reference")
    for name, x in kernels.call(operation, p).items():
        oracle.assert_close(x, expected[name].double(), name)


@pytest.mark.parametrize("rows", [6, 40, 130])
def test_each_memory_that_is_refused_is_named_with_its_reason(kernels, rows):
    only_with_kernels(kernels, "remove_patterns")
    p = kernels.put(problem(5, 20, 0, rows, 4, torch.float32))
    cov, weights = p.state.cov.clone(), HELD * p.weights
    cov[1, 0] += 1
    cov[2].neg_()
    weights[3, 17] *= 100 / HELD
    weights[4, 17] *= ((1 - 1e-6) * p.noise_var[4, 17] / (weights[4, 17] @ cov[4] @ weights[4, 17])).sqrt()
    weights[4, :17] = weights[4, 18:] = 0
    for new in ((), (HELD * HELD * p.weights, p.values)):
        function = replace_patterns if new else remove_patterns
        with pytest.raises(torch.linalg.LinAlgError) as refused:
            function(MemoryState(p.state.mean, cov), weights, p.values, *new, p.noise_var, backend=kernels.backend)
        for words in (
            "not symmetric in memory [1]",
            "not positive definite in memory [2]",
            "what is removed is not all in there in memory [3]",
            "lost in the rounding of the memory in memory [4]",
        ):
            assert words in str(refused.value)


def test_a_replacement_refuses_what_an_update_refuses(kernels):
    only_with_kernels(kernels, "replace_patterns")
    eps = torch.finfo(torch.float32).eps
    mean, cov = torch.zeros(2, 3, 2), torch.eye(3).repeat(2, 1, 1)
    new, none = torch.zeros(2, 2, 3), torch.zeros(2, 2, 3)
    new[1, :, 0] = 1
    mean, cov, none, new, values = kernels.put((mean, cov, none, new, torch.zeros(2, 2, 2)))
    with pytest.raises(torch.linalg.LinAlgError, match=r"new covariance is lost to rounding in memory \[1\]"):
        replace_patterns((mean, cov), none, values, new, values, eps / 2, old_noise_var=1.0, backend=kernels.backend)
