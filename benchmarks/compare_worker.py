"""One revision's kernels in a process of their own: does what its standard input says, a line at a time.

`load FILE` inputs saved by compare.py; `run OPERATION FILE` saves the result; `time OPERATION CALLS` answers with
seconds a call. Uses nothing but public functions, so that any revision which has them can be timed.
"""

import sys
import time

import torch

import fastkm
from fastkm import MemoryState
from fastkm.matrix_normal import logdet

GRADIENT = " + ∇"  # fastkm.cli.gradients has it too, but not in every revision


def forward(operation: str, e: dict) -> object:
    if operation == "update_posterior":
        return fastkm.update_posterior(e["prior"], e["weights"], e["values"], e["noise_var"], backend="native")
    if operation == "write":
        return fastkm.write(e["prior"], e["values"], e["noise_var"], e["ridge"], backend="native")
    if operation == "read":
        return fastkm.read(e["written"].mean, e["queries"], e["ridge"], num_iters=e["num_iters"], backend="native")
    if operation == "solve_addressing":
        return fastkm.solve_addressing(e["written"].mean, e["queries"], e["ridge"], backend="native")
    if operation == "kl_memory":
        return fastkm.kl_memory(e["written"], e["prior"], backend="native")
    return logdet(e["written"].cov, backend="native")


def tensors(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [x for part in result for x in tensors(part)]


def run(operation: str, e: dict) -> list[torch.Tensor]:
    """The tensors of a result; with the gradient, those of ½ Σ ‖output‖² by every floating-point input it has."""
    if not operation.endswith(GRADIENT):
        return tensors(forward(operation, e))
    operation = operation.removesuffix(GRADIENT)
    fields = {
        "update_posterior": ("prior", "weights", "values", "noise_var"),
        "write": ("prior", "values", "noise_var", "ridge"),
        "read": ("written", "queries", "ridge"),
    }[operation]
    inputs = e | {name: grown(e[name]) for name in fields}
    leaves = [x for name in fields for x in tensors(inputs[name])]
    outputs = [x for x in tensors(forward(operation, inputs)) if x.requires_grad]
    found = torch.autograd.grad(outputs, leaves, [x.detach() for x in outputs], allow_unused=True)
    return [x for x in found if x is not None]


def grown(x):
    return MemoryState(*map(grown, x)) if isinstance(x, tuple) else x.detach().requires_grad_()


def load(file: str) -> dict:
    e = torch.load(file)
    return e | {name: MemoryState(*e[name]) for name in ("prior", "written")}


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    print(fastkm.__file__, flush=True)
    e: dict = {}
    for line in sys.stdin:
        command, *arguments = line.rstrip("\n").split("\t")
        if command == "load":
            e, answer = load(*arguments), "loaded"
        elif command == "run":
            torch.save(run(arguments[0], e), arguments[1])
            answer = "saved"
        else:
            operation, calls = arguments[0], int(arguments[1])
            run(operation, e)  # caches and threads were the other process's
            begin = time.perf_counter()
            for _ in range(calls):
                run(operation, e)
            answer = repr((time.perf_counter() - begin) / calls)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
