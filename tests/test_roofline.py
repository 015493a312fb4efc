"""The counts behind the bound: against counting one by one, and against what PyTorch's own counter sees."""

import math

import oracle
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastkm.__main__ import main
from fastkm._runtime import counts, schema
from fastkm.addressing import reference as addressing
from fastkm.posterior import reference as posterior
from fastkm.reading import reference as reading
from fastkm.testing.operations import OPERATORS
from fastkm.testing.presets import PRESETS, Preset
from fastkm.testing.roofline import bound, bytes_to_move, inputs
from fastkm.writing import reference as writing

SMALL = Preset("small", 5, 7, 4)
QUERIES = 3


class Counted(float):
    """A number that counts what is done with it."""

    operations = 0

    def __new__(cls, value):
        return super().__new__(cls, value)


def _counting(name):
    plain = getattr(float, name)

    def operate(self, *other):
        Counted.operations += 1
        return Counted(plain(self, *other))

    return operate


for name in ("__add__", "__sub__", "__mul__", "__truediv__"):
    setattr(Counted, name, _counting(name))


def root(x):
    Counted.operations += 1
    return Counted(math.sqrt(x))


def matrix(values):
    return [[Counted(x) for x in row] for row in values.tolist()]


def cholesky(a):
    n, low = len(a), matrix(torch.zeros(len(a), len(a)))
    for j in range(n):
        for i in range(j, n):
            left = a[i][j]
            for k in range(j):
                left = left - low[i][k] * low[j][k]
            low[i][j] = root(left) if i == j else left / low[j][j]
    return low


def solve_lower(low, right, start=0):
    """Forward substitution of one column that is zero before ``start``."""
    x = [Counted(0) for _ in right]
    for i in range(start, len(right)):
        left = right[i]
        for k in range(start, i):
            left = left - low[i][k] * x[k]
        x[i] = left / low[i][i]
    return x


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_factors_and_solves_are_counted_one_by_one(n):
    basis = torch.randn(n, n, dtype=torch.float64)
    low = None

    def operations(compute):
        Counted.operations = 0
        return compute(), Counted.operations

    low, count = operations(lambda: cholesky(matrix(basis @ basis.T + torch.eye(n))))
    assert count == counts.third(n)
    columns = matrix(torch.eye(n))
    inverse, count = operations(lambda: [solve_lower(low, columns[j], j) for j in range(n)])  # L⁻¹, column by column
    assert count == counts.third(n)
    _, count = operations(lambda: [solve_lower(low, [Counted(1.0)] * n) for _ in range(3)])
    assert count == counts.triangular_solve(n, 3)

    def square():  # one triangle of L⁻ᵀ L⁻¹
        for i in range(n):
            for j in range(i + 1):
                total = inverse[i][i] * inverse[j][i]
                for k in range(i + 1, n):
                    total = total + inverse[i][k] * inverse[j][k]

    assert operations(square)[1] == counts.third(n)


OPTIONS = {"update_posterior": {}, "write": {}, "read": {"num_iters": 1}, "solve_addressing": {}}


@pytest.mark.parametrize("operator", OPTIONS)
def test_bytes_are_those_of_the_tensors_of_a_call(operator):
    K, C, T = SMALL[1:]
    p = oracle.problem(2, T, QUERIES, K, C, dtype=torch.float32)
    given = {
        "update_posterior": (*p.state, p.weights, p.values, p.noise_var),
        "write": (*p.state, p.values, p.noise_var, p.ridge),
        "read": (p.state.mean, p.queries, p.ridge),
        "solve_addressing": (p.state.mean, p.queries, p.ridge),
    }[operator]
    found = oracle.flat(oracle.call(operator, p, "reference", **OPTIONS[operator])).values()
    info = 2 * 4  # the status of each memory, which the public function looks at and does not return
    moved = sum(4 * x.numel() for x in (*given, *found)) + info
    assert bytes_to_move(operator, inputs(operator, SMALL, 2, QUERIES)) == moved


def products(function, *arguments) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


@pytest.fixture
def as_the_counter_sees(monkeypatch):
    """It sees products only, and a symmetric one as any other."""
    monkeypatch.setattr(counts, "symmetric_product", lambda n, k: 2 * n * n * k)
    monkeypatch.setattr(counts, "third", lambda n: 0)
    monkeypatch.setattr(counts, "triangular_solve", lambda n, columns: 0)


@pytest.mark.usefixtures("as_the_counter_sees")
def test_products_are_those_of_the_reference():
    _, K, C, T = SMALL
    mean, cov, weights, values = (torch.randn(1, *shape) for shape in ((K, C), (K, K), (T, K), (T, C)))
    cov = cov @ cov.mT + torch.eye(K)
    queries, noise, ridge = torch.randn(1, QUERIES, C), torch.ones(1, T), torch.ones(1)

    def count(operator):
        return sum(OPERATORS[operator].flops(K, C, T, QUERIES))

    done = products(posterior.update_block, mean, cov, weights, values, noise, None)
    innovation = 2 * T * T * K  # V Wᵀ, which pattern by pattern is one number each
    held = 2 * T * K  # Σ w_i² U_ii, the size of what rounding may take
    assert done == count("update_posterior") + innovation + held
    assert products(addressing.solve_addressing, mean, queries, ridge, False) == count("solve_addressing")
    done = products(reading.read_literal, mean, queries, ridge, 1, False)
    assert done == count("read")
    done = products(writing.write_sequential, mean, cov, values, noise, ridge, 1, False, None)
    again = (T - 1) * 2 * K * K * C  # the loop makes R Rᵀ of every mean, the bound counts one
    innovation = 2 * T * K  # wᵀa
    assert done == count("write") + again + innovation + held


@pytest.mark.usefixtures("as_the_counter_sees")
@pytest.mark.parametrize("operator", ["update_posterior", "write", "read"])
def test_a_backward_asks_for_less_than_autograd_does(operator):
    _, K, C, T = SMALL
    p = oracle.problem(1, T, QUERIES, K, C, dtype=torch.float32)
    p = oracle.map_tensors(p, lambda x: x.requires_grad_() if x.is_floating_point() else x)

    def forward_and_backward():
        found = oracle.flat(oracle.call(operator, p, "reference", **OPTIONS[operator]))
        sum(x.sum() for x in found.values() if x.requires_grad).backward()

    assert 0 < sum(OPERATORS[f"{operator}_backward"].flops(K, C, T, QUERIES)) <= products(forward_and_backward)


def test_every_operator_has_its_bound():
    assert set(schema.OPERATORS) <= set(OPERATORS)


def test_whatever_has_most_to_do_is_the_bound():
    update = bound("update_posterior", PRESETS["LLM"], 64, 32)
    assert update.by == "memory"
    assert update.seconds == update.bytes / 3.35e12
    exact, rounded = (bound("write", PRESETS["XL"], 64, 32, precision) for precision in ("ieee", "tf32"))
    assert exact.by == "float32"
    assert exact.seconds == sum(exact.flops) / 67e12 > rounded.seconds
    twice = bound("write", PRESETS["XL"], 128, 32)
    assert twice.seconds == 2 * exact.seconds


def test_the_table_has_every_operator_and_calls_itself_a_bound(capsys):
    assert main(["roofline", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "not a measurement" in out
    assert "B = 2" in out
    for operator in OPERATORS:
        assert out.count(f" {operator} ") == len(PRESETS)
