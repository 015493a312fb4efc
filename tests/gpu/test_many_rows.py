"""K = 512, of which a CUDA block holds only pieces on chip: factors and their like go through its workspace.

Everything else is small, so that it runs in seconds on the host as well.
"""

import oracle
import pytest
import torch
from oracle import map_tensors, problem

from gpu.support import USES, outputs, widened

SHAPE = (1, 2, 2, 512, 5)  # B, T, Q, K, C
OPERATIONS = tuple(USES)


@pytest.fixture(autouse=True)
def only_where_it_is_fast(request):
    if request.config.getoption("--kernels") not in ("simt", "gpu"):
        pytest.skip("needs --kernels=simt or gpu")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_equals_the_reference(kernels, operation):
    p = problem(*SHAPE, torch.float32)
    kernels.judge(operation, p, outputs(operation, map_tensors(p, widened), "reference"))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients(kernels, operation):
    kernels.judge_gradient(operation, problem(*SHAPE, torch.float32))


def test_factor_once_solve_again(kernels):
    operators = torch.ops.fastkm if kernels.backend == "native" else torch.ops.fastkm_triton
    p = problem(*SHAPE, torch.float32)
    mean, queries, ridge = kernels.put((p.state.mean, p.queries, p.ridge))
    lower, info = operators.factor_addressing(mean, ridge)
    assert not info.any()
    again = operators.solve_factored(mean, lower, queries)
    oracle.assert_close(again.cpu(), operators.solve_addressing(mean, queries, ridge, False)[0].double().cpu())
