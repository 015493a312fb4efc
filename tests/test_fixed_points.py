"""Where reads rest: the analysis against models for which everything is known."""

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

pytest.importorskip("safetensors", reason="the analysis opens checkpoints")

from examples.dkm import fixed_points
from fastkm import KanervaMemory, MemoryState
from fastkm.models import DynamicKanervaMachine

K, C, N, GAIN = 3, 7, 5, 0.5


class Scaled(nn.Module):
    def forward(self, codes):
        return Independent(Normal(GAIN * codes, 1.0), 1)


@pytest.fixture
def linear():
    """Codes are patterns, and a decoder that halves them: reads go to 0, by a Jacobian that is known."""
    torch.manual_seed(0)
    memory = KanervaMemory(C, K, backend="reference")
    model = DynamicKanervaMachine(nn.Identity(), Scaled(), memory).double().eval()
    mean = torch.randn(1, K, C, dtype=torch.float64)
    state = MemoryState(mean, torch.eye(K, dtype=torch.float64)[None])
    return model, state, fixed_points.LinearRead.of(model, state), torch.randn(N, C, dtype=torch.float64)


def test_parts_of_a_first_read_are_those_of_its_equation(linear):
    model, state, memory, codes = linear
    rows, found = state.mean[0], fixed_points.distances(model, memory, codes)
    read = rows.mT @ torch.linalg.inv(rows @ rows.mT + model.memory.ridge * torch.eye(K)) @ rows
    along = torch.linalg.pinv(rows) @ rows
    parts = {
        "interference": codes - codes @ along,
        "shrinkage": codes @ along - codes @ read,
        "codec": (1 - GAIN) * codes @ read,
        "read 1": codes - codes @ read,
    }
    for name, part in parts.items():
        torch.testing.assert_close(found[name], part.norm(dim=1) / codes.norm(dim=1), msg=name)


def test_the_jacobian_of_a_linear_model(linear):
    model, state, memory, codes = linear
    gram = torch.linalg.eigvalsh(state.mean[0] @ state.mean[0].mT)
    largest = (GAIN * gram / (gram + model.memory.ridge)).max().expand(N)
    found = fixed_points.distances(model, memory, codes)
    torch.testing.assert_close(found["spectral radius"], largest)
    torch.testing.assert_close(found["largest singular value"], largest)


def test_a_code_in_the_memory_that_the_codec_keeps_is_at_rest(linear):
    """The image of a pattern that every read returns has no wrong pixel and does not move."""
    model = linear[0]
    patterns = torch.eye(K, C, dtype=torch.float64)
    model.decoder = type("Exact", (nn.Module,), {"forward": lambda self, z: Independent(Normal(z, 1.0), 1)})()
    memory = fixed_points.LinearRead(patterns.mT, patterns.mT @ patterns)
    found = fixed_points.resting(model, patterns, memory, patterns)
    assert found["at rest"].tolist() == [1] * K
    assert found["wrong pixels, read 100"].tolist() == [0] * K
    other = fixed_points.resting(model, patterns.flip(1), memory, patterns.flip(1))
    assert (other["wrong pixels, read 1"] > 0).any()
