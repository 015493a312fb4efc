"""Derived tolerances: how far a result may be from the truth."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastkm import MemoryState
from oracle.problems import Problem

# Two float64 algorithms for one quantity agree to 1e-12 of its largest entry; in units of rounding, for any dtype:
ROUNDINGS = 1e-12 / torch.finfo(torch.float64).eps


def flat(result) -> dict[str, Tensor]:
    """The tensors of a result by name; a nested state is opened."""
    if isinstance(result, Tensor):
        return {"weights" if result.dim() == 3 else "kl_memory": result}
    fields = {}
    for name, value in result._asdict().items():
        fields |= flat(value) if isinstance(value, tuple) else {name: value}
    return fields


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def error(actual: Tensor, truth: Tensor) -> float:
    assert actual.shape == truth.shape, f"shape {list(actual.shape)}, expected {list(truth.shape)}"
    return largest(actual.double() - truth.double())


def assert_close(actual: Tensor, truth: Tensor, name: str = "", *, scale: float = 0.0) -> None:
    """Within ROUNDINGS of the largest entry, or of ``scale`` where the entries are small differences of such terms."""
    assert actual.is_floating_point(), f"{name}: {actual.dtype}"
    bound = ROUNDINGS * torch.finfo(actual.dtype).eps * max(largest(truth), scale)
    assert error(actual, truth) <= bound, f"{name}: error {error(actual, truth):.3g} exceeds {bound:.3g}"


def assert_result(
    actual, truth: dict[str, Tensor], own_errors: dict[str, float] | None = None, times: Mapping[str, float] = {}
) -> None:
    """Hold every field of a result to the truth: by rounding, or to twice the reference's ``own_errors``.

    With those the bound is 2 (own error + eps · max|truth|), or ``times`` instead of 2 where it names the field.
    Integers must be the same. A KL is a difference of terms of size C, which is the least its rounding is measured in.
    """
    actual = flat(actual)
    for name, expected in truth.items():
        got, scale = actual[name], float(actual["mean"].shape[-1]) if name == "kl" else 0.0
        if not got.is_floating_point():
            assert torch.equal(got, expected), name
        elif own_errors is None:
            assert_close(got, expected, name, scale=scale)
        else:
            bound = times.get(name, 2) * (own_errors[name] + torch.finfo(got.dtype).eps * max(largest(expected), scale))
            assert error(got, expected) <= bound, f"{name}: error {error(got, expected):.3g} exceeds {bound:.3g}"


def judge(
    run, p: Problem, truth: dict[str, Tensor], backend: str, *, draws: int = 8, times: Mapping[str, float] = {}
) -> None:
    """Run a backend on a problem, ``run(p, backend)``, and hold it to the truth.

    In float32 a backend may be twice as wrong as the reference is in float32, or ``times`` as wrong in a field that
    ``times`` names. In float64 the limit is 1e-12 for every backend: a truth in float64 is itself no better, so it
    cannot judge a factor of two.
    """
    if backend == "reference" or p.state.mean.dtype == torch.float64:
        assert_result(run(p, backend), truth)
    else:
        assert_result(run(p, backend), truth, reference_errors(run, p, truth, draws), times)


def reference_errors(run, p: Problem, truth: dict[str, Tensor], draws: int) -> dict[str, float]:
    """The reference's own errors: the worst of several draws of its rounding.

    The order of a memory's rows has no meaning, so each draw is the same problem with its rows in another order. One
    draw can be right by luck where the problem is ill-conditioned.
    """
    rows, errors = p.state.mean.shape[1], dict.fromkeys(truth, 0.0)
    for seed in range(draws):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)) if seed else torch.arange(rows)
        mean, cov = p.state
        state = MemoryState(mean[:, order], cov[:, order][:, :, order])
        result = flat(run(p._replace(state=state, weights=p.weights[:, :, order]), "reference"))
        for name, expected in truth.items():
            if name in ("mean", "cov"):
                expected = expected[:, order]
            if name in ("cov", "weights"):
                expected = expected[:, :, order]
            errors[name] = max(errors[name], error(result[name], expected))
    return errors


def equal(a, b) -> bool:
    """The same bits, NaN included."""
    pairs = list(zip(flat(a).values(), flat(b).values(), strict=True))
    return all(torch.equal(x, y) or torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) for x, y in pairs)
