"""Memories of more rows than registers hold: they take other kernels, or keep their matrices elsewhere."""

import pytest
import torch
from oracle import map_tensors, problem

from gpu.support import outputs, widened


@pytest.mark.parametrize(
    ("operation", "shape"),  # B, T, Q, K, C
    [
        ("write", (1, 3, 0, 70, 8)),
        ("write", (1, 2, 0, 130, 8)),
        ("update_posterior", (1, 3, 0, 130, 8)),
        ("read", (1, 0, 3, 130, 8)),
    ],
    ids=str,
)
def test_equals_the_reference(kernels, operation, shape):
    p = problem(*shape, torch.float32)
    kernels.judge(operation, p, outputs(operation, map_tensors(p, widened), "reference"))
