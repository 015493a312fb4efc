"""The literal float32 loop, and the kernels: outputs by name, and the status of every memory."""

import torch
from torch import Tensor

import fastkm.addressing.native
import fastkm.posterior.native
import fastkm.reading.native
import fastkm.writing.native
from fastkm import MemoryState, read, solve_addressing, update_posterior, write
from fastkm._linalg.reference import first_failure
from fastkm.addressing import reference as addressing
from fastkm.posterior import reference as posterior
from fastkm.reading import reference as reading
from fastkm.writing import reference as writing
from fuzz.problems import Problems

FIELDS = {
    "write": ("mean", "cov", "weights", "innovation_var", "kl"),
    "update_posterior": ("mean", "cov", "innovation_var", "kl", "log_evidence"),
    "read": ("values", "weights"),
    "solve_addressing": ("weights",),
}
KERNELS = {
    "write": fastkm.writing.native.write,
    "update_posterior": fastkm.posterior.native.update_posterior,
    "read": fastkm.reading.native.read,
    "solve_addressing": fastkm.addressing.native.solve_addressing,
}

Outcome = tuple[dict[str, Tensor], Tensor]


def literal_update(mean, cov, weights, values, noise_var, mask):
    """The block form with one pattern a block."""
    status, evidence, steps = None, 0.0, []
    for t in range(values.shape[1]):
        now = slice(t, t + 1)
        here = None if mask is None else mask[:, now]
        given = (weights[:, now], values[:, now], noise_var[:, now], here)
        mean, cov, s, kl, log_evidence, info = posterior.update_block(mean, cov, *given)
        status = info if status is None else first_failure(status, info)
        evidence = evidence + log_evidence
        steps.append((s, kl))
    s, kl = (torch.cat(x, 1) for x in zip(*steps, strict=True))
    return mean, cov, s, kl, evidence, status


def literal(problems: Problems, inputs: dict[str, Tensor]) -> Outcome:
    given, times, squared = inputs.values(), problems.times, problems.squared_gram
    if problems.operation == "write":
        outputs = writing.write_sequential(*given, times, squared, problems.mask)
    elif problems.operation == "update_posterior":
        outputs = literal_update(*given, problems.mask)
    elif problems.operation == "read":
        outputs = reading.read_literal(*given, times, squared)
    else:
        outputs = addressing.solve_addressing(*given, squared)
    return named(problems, outputs)


def kernel(problems: Problems, inputs: dict[str, Tensor]) -> Outcome:
    options = {
        "write": (problems.times, problems.squared_gram, problems.mask, 0),
        "update_posterior": (problems.mask, 0),
        "read": (problems.times, problems.squared_gram, 0, None),
        "solve_addressing": (problems.squared_gram,),
    }[problems.operation]
    return named(problems, KERNELS[problems.operation](*inputs.values(), *options))


def named(problems: Problems, outputs: tuple) -> Outcome:
    return dict(zip(FIELDS[problems.operation], outputs[:-1], strict=True)), outputs[-1].detach()


def words_of_refusal(problems: Problems) -> str:
    """What the public function says; empty if it refuses nothing."""
    x = dict(problems.inputs)
    method = "deepmind" if problems.squared_gram else "ridge"
    state = MemoryState(x["mean"], x["cov"]) if "cov" in x else None
    try:
        if problems.operation == "write":
            write(state, x["values"], x["noise_var"], x["ridge"], num_opt_iters=problems.times, method=method,
                  mask=problems.mask, backend="native")  # fmt: skip
        elif problems.operation == "update_posterior":
            update_posterior(state, x["weights"], x["values"], x["noise_var"], mask=problems.mask, backend="native")
        elif problems.operation == "read":
            read(x["mean"], x["queries"], x["ridge"], num_iters=problems.times, method=method, backend="native")
        else:
            solve_addressing(x["mean"], x["queries"], x["ridge"], method=method, backend="native")
    except torch.linalg.LinAlgError as error:
        return str(error)
    return ""
