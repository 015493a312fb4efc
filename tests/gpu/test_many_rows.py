"""Memories of 512 rows and little else.

They reach every block of a blocked factorisation and every row of a split search; a CUDA thread block holds only pieces
of such a memory on chip.
"""

import oracle
import pytest
import torch
from oracle import map_tensors, problem

import fastkm
from gpu.support import USES, outputs, widened

ROWS = 512


@pytest.fixture
def rung(request):
    return request.config.getoption("--kernels")


@pytest.fixture
def p(rung, kernels):
    if rung == "interpreter":
        pytest.skip("takes minutes")
    return problem(1, 2, 2, ROWS, 40, torch.float32)


CALLS = [(operation, {}) for operation in USES if operation != "read"]
CALLS += [("read", {"num_iters": 2}), ("update_posterior", {"precision": "tf32x3"})]


@pytest.mark.parametrize(("operation", "options"), CALLS, ids=str)
def test_equals_the_reference(kernels, p, operation, options):
    truth = outputs(operation, map_tensors(p, widened), "reference", **options)
    kernels.judge(operation, p, truth, draws=32, **options)  # the roundings of sums of 512 terms vary much


@pytest.mark.parametrize("operation", USES)
def test_gradients(rung, kernels, p, operation):
    if rung == "ttsem":
        pytest.skip("takes minutes")
    kernels.judge_gradient(operation, p)


def test_factor_once_read_again(rung, kernels, p):
    if rung == "ttsem":
        pytest.skip("takes minutes")
    mean, queries, ridge = kernels.put((p.state.mean, p.queries, p.ridge))
    factor = fastkm.factor_addressing(mean, ridge, backend=kernels.backend)
    for options in ({}, {"num_iters": 2}):
        again = fastkm.read_factored(factor, queries, backend=kernels.backend, **options)
        for got, exact in zip(
            again, fastkm.read(mean, queries, ridge, backend=kernels.backend, **options), strict=True
        ):
            oracle.assert_close(got.cpu(), exact.double().cpu())
