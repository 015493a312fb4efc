"""Memories of 512 rows, on few numbers otherwise: every block of a blocked factor, every row of a split search."""

import pytest
import torch
from oracle import map_tensors, problem

from gpu.support import outputs, widened

ROWS = 512


@pytest.fixture
def p(request, kernels):
    if request.config.getoption("--kernels") not in ("ttsem", "gpu"):
        pytest.skip("takes minutes")
    return problem(1, 2, 2, ROWS, 40, torch.float32)


@pytest.mark.parametrize(
    ("operation", "options"),
    [
        ("update_posterior", {}),
        ("update_posterior", {"precision": "tf32x3"}),
        ("write", {}),
        ("read", {"num_iters": 2}),
        ("solve_addressing", {}),
        ("kl_memory", {}),
    ],
    ids=str,
)
def test_equals_the_reference(kernels, p, operation, options):
    kernels.judge(operation, p, outputs(operation, map_tensors(p, widened), "reference", **options), draws=8, **options)
