"""PyTorch's own counter of operations, beside the counts of this package."""

import subprocess
import sys

import pytest
import torch
from oracle import as_operands, call, problem
from torch.utils.flop_counter import FlopCounterMode

from fastkm._runtime import counts, schema
from fastkm.testing.operations import OPERATORS

B, T, Q, K, C = 3, 5, 4, 6, 7


def count(function, *arguments):
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize("namespace", ["fastkm", "fastkm_triton"])
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_every_operator_has_its_count(operator, namespace):
    """On meta tensors: no kernel runs."""
    operands = as_operands(problem(B, T, Q, K, C, torch.float32))
    arguments = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in operator.arguments(operands)]
    function = getattr(getattr(torch.ops, namespace), operator.name)
    assert count(function, *arguments) == B * sum(getattr(counts, operator.name)(K, C, T, Q))


def test_every_operator_is_in_the_registry():
    assert set(OPERATORS) == set(schema.DEFINED)


@pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))
@pytest.mark.parametrize("operation", ["update_posterior", "write", "read", "solve_addressing", "kl_memory"])
def test_a_call_counts_its_operator_and_the_gradient_its_backward(operation):
    p = problem(B, T, Q, K, C, torch.float32)
    forward = B * sum(getattr(counts, operation)(K, C, T, Q))
    assert count(call, operation, p, "native") == forward
    mean = p.state.mean.requires_grad_()
    changed = p._replace(state=p.state._replace(mean=mean))

    def forward_and_backward():
        result = call(operation, changed, "native")
        outputs = [x for x in torch.utils._pytree.tree_leaves(result) if x.requires_grad]
        sum(x.sum() for x in outputs).backward()

    backward = {"solve_addressing": "read"}.get(operation, operation) + "_backward"
    assert count(forward_and_backward) == forward + B * sum(getattr(counts, backward)(K, C, T, Q))


def test_the_counter_is_not_imported_for_the_package():
    """It would bring Triton along, which takes longer to import than the package. Later it finds the formulas."""
    script = (
        "import sys, fastkm, torch\n"
        "assert 'torch.utils.flop_counter' not in sys.modules\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "assert torch.ops.fastkm.read in flop_registry\n"
        "assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith('fastkm')]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
