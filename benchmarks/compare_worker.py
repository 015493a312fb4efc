"""One revision's package in a process of its own: obeys the lines on its standard input.

`load FILE`: inputs saved by compare.py. `run OPERATION GRADIENT FILE`: saves the result. `time OPERATION GRADIENT
CALLS`: answers with seconds a call. `call OPERATION GIVEN CALLS`: the same for a call on one entry. GRADIENT is
"forward" or "gradient".
"""

# ATTENTION: THE TABLES OF CALLS IN THIS FILE ARE COPIES OF fastkm/testing/operations.py, ON PURPOSE. This file also
# runs with the package of an OLD revision, which may have no registry or another one. It must import nothing but torch
# and the public functions of fastkm. A new operation is added here by hand.

import sys
import time
from collections.abc import Callable
from functools import partial

import torch

import fastkm
from fastkm import MemoryState
from fastkm.matrix_normal import logdet

GRADIENT_INPUTS = {
    "update_posterior": ("prior", "weights", "values", "noise_var"),
    "remove_patterns": ("written", "weights", "values", "noise_var"),
    "replace_patterns": ("written", "weights", "values", "noise_var"),
    "update_square_root": ("prior", "weights", "values", "noise_var"),
    "filter_posterior": ("prior", "weights", "values", "noise_var", "ridge"),
    "write": ("prior", "values", "noise_var", "ridge"),
    "read": ("written", "queries", "ridge"),
    "read_factored": ("written", "queries", "ridge"),
}


def forward(operation: str, e: dict) -> object:
    if operation == "update_posterior":
        return fastkm.update_posterior(e["prior"], e["weights"], e["values"], e["noise_var"], backend="native")
    if operation == "remove_patterns":
        return fastkm.remove_patterns(e["written"], e["weights"], e["values"], e["noise_var"], backend="native")
    if operation == "replace_patterns":
        new = 0.5 * e["weights"].flip(1), 0.5 * e["values"]
        return fastkm.replace_patterns(e["written"], e["weights"], e["values"], *new, e["noise_var"], backend="native")
    if operation == "update_square_root":
        root = fastkm.SquareRootState(e["prior"].mean, torch.linalg.cholesky_ex(e["prior"].cov).L)
        return fastkm.update_square_root(root, e["weights"], e["values"], e["noise_var"], backend="native")
    if operation == "filter_posterior":
        decay = {"retention": torch.exp(-0.05 * e["noise_var"]), "prior_var": e["ridge"]}
        rows = e["weights"], e["values"], e["weights"].flip(1)
        return fastkm.filter_posterior(e["prior"], *rows, e["noise_var"], **decay, backend="native")
    if operation == "write":
        return fastkm.write(e["prior"], e["values"], e["noise_var"], e["ridge"], backend="native")
    if operation == "read":
        return fastkm.read(e["written"].mean, e["queries"], e["ridge"], num_iters=e["num_iters"], backend="native")
    if operation == "solve_addressing":
        return fastkm.solve_addressing(e["written"].mean, e["queries"], e["ridge"], backend="native")
    if operation == "factor_addressing":
        return fastkm.factor_addressing(e["written"].mean, e["ridge"], backend="native").pseudoinverse
    if operation in ("solve_factored", "read_factored"):
        if "factor" not in e:  # it is made once
            e["factor"] = fastkm.factor_addressing(e["written"].mean, e["ridge"], backend="native")
        if operation == "solve_factored":
            return fastkm.solve_factored(e["factor"], e["queries"], backend="native")
        return fastkm.read_factored(e["factor"], e["queries"], num_iters=e["num_iters"], backend="native")
    if operation == "kl_memory":
        return fastkm.kl_memory(e["written"], e["prior"], backend="native")
    return logdet(e["written"].cov, backend="native")


def one_entry_calls() -> dict[tuple[str, str], Callable[[], object]]:
    """Calls on B = T = K = C = Q = 1, where overhead is everything, by operation and how its numbers are given.

    "floats" and "tensors" are the public function, "operator" is the registered operator behind it.
    """
    mean, cov, z, w = (torch.ones(1, 1, 1) for _ in range(4))
    state, noise, ridge, calls = MemoryState(mean, cov), torch.ones(1, 1), torch.ones(1), {}
    operators = torch.ops.fastkm
    for given, one_noise, one_ridge in (("floats", 1.0, 1.0), ("tensors", noise, ridge)):
        calls["update_posterior", given] = lambda n=one_noise: fastkm.update_posterior(state, w, z, n)
        calls["write", given] = lambda n=one_noise, r=one_ridge: fastkm.write(state, z, n, r)
        calls["read", given] = lambda r=one_ridge: fastkm.read(mean, z, r)
    calls["logdet", "tensors"] = lambda: logdet(cov)
    calls["update_posterior", "operator"] = lambda: operators.update_posterior.default(mean, cov, w, z, noise, None, 0)
    calls["write", "operator"] = lambda: operators.write.default(mean, cov, z, noise, ridge, 1, False, None, 0)
    calls["read", "operator"] = lambda: operators.read.default(mean, z, ridge, 1, False, 0)
    calls["logdet", "operator"] = lambda: operators.logdet.default(cov)
    return calls


def tensors(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [x for part in result for x in tensors(part)]


def run(operation: str, gradient: bool, e: dict) -> list[torch.Tensor]:
    """The tensors of a result; with the gradient, those of ½ Σ ‖output‖² by every floating-point input it has."""
    if not gradient:
        return tensors(forward(operation, e))
    fields = GRADIENT_INPUTS[operation]
    inputs = e | {name: as_leaf(e[name]) for name in fields}
    inputs.pop("factor", None)  # of tensors without a gradient
    leaves = [x for name in fields for x in tensors(inputs[name])]
    outputs = [x for x in tensors(forward(operation, inputs)) if x.requires_grad]
    found = torch.autograd.grad(outputs, leaves, [x.detach() for x in outputs], allow_unused=True)
    return [x for x in found if x is not None]


def as_leaf(x):
    return MemoryState(*map(as_leaf, x)) if isinstance(x, tuple) else x.detach().requires_grad_()


def load(file: str) -> dict:
    e = torch.load(file)
    return e | {name: MemoryState(*e[name]) for name in ("prior", "written")}


def seconds_a_call(call: Callable[[], object], calls: int) -> float:
    call()  # the other process has used the caches and the threads
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    print(fastkm.__file__, flush=True)
    e: dict = {}
    small = one_entry_calls()
    for line in sys.stdin:
        command, *arguments = line.rstrip("\n").split("\t")
        if command == "load":
            e, answer = load(*arguments), "loaded"
        elif command == "run":
            operation, gradient, file = arguments
            torch.save(run(operation, gradient == "gradient", e), file)
            answer = "saved"
        elif command == "call":
            operation, given, calls = arguments
            answer = repr(seconds_a_call(small[operation, given], int(calls)))
        else:
            operation, gradient, calls = arguments
            answer = repr(seconds_a_call(partial(run, operation, gradient == "gradient", e), int(calls)))
        print(answer, flush=True)


if __name__ == "__main__":
    main()
