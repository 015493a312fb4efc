"""The fuzzer on a few problems of one seed; ``make fuzz`` draws more."""

import math

import pytest
import torch
from fuzz import truth
from fuzz.judge import FAULTS, GOOD, judge
from fuzz.problems import DRAWS, OPERATIONS, draw
from oracle import assert_close, batched, problem
from oracle import equations as oracle

from fastkm._runtime import schema

native = pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))


@native
@pytest.mark.parametrize("numbers", [range(8 * n, 8 * n + 8) for n in range(8)], ids=lambda r: f"{r[0]}-{r[-1]}")
def test_no_kernel_is_worse_than_the_literal_loop(numbers):
    verdicts = [v for number in numbers for v in judge(draw(0, number, 8), 0)]
    assert [v for v in verdicts if v.outcome in FAULTS] == []
    assert sum(v.outcome == GOOD for v in verdicts) > len(verdicts) / 2


def test_a_draw_is_the_same_again_and_has_neighbours():
    first, again, other = draw(3, 5, 2), draw(3, 5, 2), draw(3, 6, 2)
    assert str(first) == str(again) != str(other)
    for name, x in first.inputs.items():
        assert torch.equal(x, again.inputs[name])
        drawn = x[::DRAWS].repeat_interleave(DRAWS, 0)
        assert ((x - drawn).abs() <= 1e-6 * drawn.abs() + 1e-37).all()


def test_every_operation_is_drawn():
    assert {draw(0, number, 1).operation for number in range(40)} == set(OPERATIONS)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("times", [1, 3])
def test_the_truth_is_that_of_the_oracle(times, squared):
    p = problem(3, 7, 4, 5, 4, masked=True)
    inputs = {"mean": p.state.mean, "cov": p.state.cov, "values": p.values, "noise_var": p.noise_var, "ridge": p.ridge}
    drawn = draw(0, 0, 1)._replace(operation="write", mask=p.mask, times=times, squared_gram=squared)
    wanted = batched(oracle.write, *inputs.values(), p.mask, num_opt_iters=times, squared=squared)
    for name, x in truth.run(drawn, inputs).items():
        assert_close(x, wanted[name], name)
    inputs = {"mean": p.state.mean, "queries": p.queries, "ridge": p.ridge}
    wanted = batched(oracle.read, *inputs.values(), num_iters=times, squared=squared)
    for name, x in truth.run(drawn._replace(operation="read"), inputs).items():
        assert_close(x, wanted[name], name)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("rows", [3, 6])
def test_the_gradient_of_the_truth(rows, squared):
    p = problem(2, 1, 3, rows, 4)
    inputs = [x.requires_grad_() for x in (p.state.mean, p.queries, p.ridge)]
    assert torch.autograd.gradcheck(lambda *x: truth.Ridge.apply(*x, squared), inputs)


def test_the_divergence_of_a_step_keeps_its_digits():
    x = torch.logspace(-8, 3, 200, dtype=torch.float64)
    exact = torch.tensor([math.fsum((-1) ** n * (n - 1) / n * v**n for n in range(2, 40)) if v < 0.3
                          else math.log1p(v) - v / (1 + v) for v in x.tolist()], dtype=torch.float64)  # fmt: skip
    assert ((truth.step_divergence(x) - exact).abs() <= 1e-12 * exact).all()
