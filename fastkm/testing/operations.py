"""The registry: one entry for each operation, from which check, bench, benchmarks/, tests/ and tools/ take their lists.

An entry holds everything that is known of an operation outside its own folder: the public function and its arguments,
what it must compute, what it is differentiated by, and the registered operators behind it with their counts. A new
family adds its entries here and nowhere else.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkm
from fastkm._runtime import counts, dispatch
from fastkm._runtime.counts import Flops
from fastkm.matrix_normal import logdet, reference
from fastkm.posterior.reference import update_sequential
from fastkm.testing import definitions
from fastkm.testing.definitions import Result
from fastkm.testing.episodes import Episode
from fastkm.testing.gradients import Inputs, gradient_of, symmetric
from fastkm.testing.operands import Operands


class Operator(NamedTuple):
    """A registered operator, ``torch.ops.fastkm.<name>``."""

    name: str
    arguments: Callable[[Operands], tuple]
    flops: Callable[[int, int, int, int], Flops]  # of K, C, T, Q; one memory


class Operation(NamedTuple):
    """An entry of the registry."""

    name: str
    function: Callable[..., Any]  # the public one
    arguments: Callable[[Episode], dict[str, Any]]  # by name, in the order of its signature, without the backend
    definition: Callable[[Episode], Result]  # in float64 the truth
    other: Callable[[Episode], Result]  # shares no code with the definition
    unit: str  # what is counted per second: patterns, reads or memories
    loop: Callable[[Episode], object] | None = None  # the literal PyTorch loop, where the reference is another form
    inputs: Inputs | None = None  # what it is differentiated by; None: its gradient is no case
    operator: Operator | None = None  # None: it is made of other operations, or has the reference only
    backward: Operator | None = None
    parts: tuple[Operator, ...] = ()  # operators that do a part of the job, on a CPU
    value: str = "value"  # the name of a result that is one tensor
    compared: tuple[str, ...] = ()  # the fields of a result that the definition has; empty: all

    @property
    def takes_precision(self) -> bool:
        return "precision" in inspect.signature(self.function).parameters

    def bind(self, e: Episode, backend: str | None, **options: Any) -> Callable[[], Any]:
        """The call of the public function, ready to be made; ``options`` are added to its arguments or replace them."""
        return partial(self.function, **{**self.arguments(e), **options}, backend=backend)

    def fields(self, result: Any) -> Result:
        found = named(result, self.value)
        return {name: found[name] for name in self.compared} if self.compared else found

    def run(self, e: Episode, backend: str | None, **options: Any) -> Result:
        return self.fields(self.bind(e, backend, **options)())

    def units(self, e: Episode) -> int:
        """How many patterns, reads or memories one call handles."""
        (batch, patterns), queries = e.values.shape[:2], e.queries.shape[1]
        return batch * {"patterns": patterns, "reads": queries, "memories": 1}[self.unit]


def named(result: Any, name: str) -> Result:
    """The floating-point tensors of a public function's result, by name."""
    if isinstance(result, Tensor):
        return {name: result} if result.is_floating_point() else {}
    return {key: tensor for field, value in result._asdict().items() for key, tensor in named(value, field).items()}


# ---- arguments of operators and their backwards: those of the forward, then the cotangents --------------------------


def update_arguments(o: Operands) -> tuple:
    return o.mean, o.cov, o.weights, o.values, o.noise_var, o.mask, o.precision


def update_backward_arguments(o: Operands) -> tuple:
    return *update_arguments(o), o.mean, o.cov, o.noise_var, o.noise_var, o.ridge


def remove_arguments(o: Operands) -> tuple:
    return o.mean, o.cov, o.weights * 0.05, o.values, o.noise_var, o.mask  # a memory may hold so little of a pattern


def remove_backward_arguments(o: Operands) -> tuple:
    return *remove_arguments(o), o.mean, o.cov


def replace_arguments(o: Operands) -> tuple:
    return o.mean, o.cov, o.weights * 0.05, o.values, o.weights, o.values, o.noise_var, o.noise_var, o.mask


def replace_backward_arguments(o: Operands) -> tuple:
    return *replace_arguments(o), o.mean, o.cov


def square_root_arguments(o: Operands) -> tuple:
    return o.mean, o.cov, o.weights, o.values, o.noise_var, o.mask


def square_root_backward_arguments(o: Operands) -> tuple:
    return *square_root_arguments(o), o.mean, o.cov


def filter_arguments(o: Operands) -> tuple:
    factors = (o.noise_var / (1 + o.noise_var), o.ridge.expand(o.mean.shape[:1]), None)
    return (*o[:2], o.weights, o.values, o.weights, o.noise_var, *factors, False, o.mask, o.precision)


def filter_backward_arguments(o: Operands) -> tuple:
    return *filter_arguments(o), o.mean, o.cov, o.values, o.noise_var, o.noise_var, o.ridge.expand(o.mean.shape[:1])


def write_arguments(o: Operands) -> tuple:
    return o.mean, o.cov, o.values, o.noise_var, o.ridge, o.num_opt_iters, o.squared_gram, o.mask, o.precision


def write_backward_arguments(o: Operands) -> tuple:
    return *write_arguments(o), o.weights, o.mean, o.cov, o.weights, o.noise_var, o.noise_var


def write_gram_arguments(o: Operands) -> tuple:
    rows = torch.cat((o.mean, o.values), 1)
    return rows @ rows.mT, o.cov, o.noise_var, o.ridge, o.mean.shape[2], o.num_opt_iters, o.mask


def read_arguments(o: Operands) -> tuple:
    return o.mean, o.queries, o.ridge, o.num_iters, o.squared_gram, o.precision


def read_backward_arguments(o: Operands) -> tuple:
    return *read_arguments(o), o.queries, o.read_weights


def addressing_arguments(o: Operands) -> tuple:
    return o.mean, o.queries, o.ridge, o.squared_gram


def factor_arguments(o: Operands) -> tuple:
    return o.mean, o.ridge, o.squared_gram


def solve_factored_arguments(o: Operands) -> tuple:
    pseudoinverse, gram = o.mean.mT.contiguous(), o.cov if o.squared_gram else o.cov[:, :0]
    return o.mean, o.queries, o.ridge, o.cov, pseudoinverse, gram


def read_factored_arguments(o: Operands) -> tuple:
    return *solve_factored_arguments(o), o.num_iters, o.precision


def read_factored_backward_arguments(o: Operands) -> tuple:
    return *read_factored_arguments(o), o.queries, o.read_weights


def kl_arguments(o: Operands) -> tuple:
    return o.mean, o.cov, o.mean, o.cov


def kl_backward_arguments(o: Operands) -> tuple:
    return *kl_arguments(o), o.ridge


def logdet_arguments(o: Operands) -> tuple:
    return (o.cov,)


def logdet_backward_arguments(o: Operands) -> tuple:
    return o.cov, o.ridge


# ---- the entries ---------------------------------------------------------------------------------------------------

ENTRIES = (
    Operation(
        "update_posterior",
        fastkm.update_posterior,
        lambda e: {"state": e.prior, "weights": e.weights, "values": e.values, "noise_var": e.noise_var},
        definitions.update_one_by_one,
        definitions.update_normal_equations,
        "patterns",
        loop=lambda e: update_sequential(*e.prior, e.weights, e.values, e.noise_var),
        inputs=Inputs("prior", ("weights", "values", "noise_var")),
        operator=Operator("update_posterior", update_arguments, counts.update_posterior),
        backward=Operator("update_posterior_backward", update_backward_arguments, counts.update_posterior_backward),
    ),
    Operation(
        "write",
        fastkm.write,
        lambda e: {"state": e.prior, "values": e.values, "noise_var": e.noise_var, "ridge": e.ridge},
        definitions.write_literal,
        definitions.write_gram_space,
        "patterns",
        inputs=Inputs("prior", ("values", "noise_var", "ridge")),
        operator=Operator("write", write_arguments, counts.write),
        backward=Operator("write_backward", write_backward_arguments, counts.write_backward),
        parts=(Operator("write_gram", write_gram_arguments, counts.write_gram),),
    ),
    Operation(
        "remove_patterns",
        fastkm.remove_patterns,
        lambda e: {"state": e.written, "weights": e.weights, "values": e.values, "noise_var": e.noise_var},
        definitions.remove_one_by_one,
        definitions.remove_normal_equations,
        "patterns",
        loop=definitions.remove_one_by_one,
        inputs=Inputs("written", ("weights", "values", "noise_var")),
        operator=Operator("remove_patterns", remove_arguments, counts.remove_patterns),
        backward=Operator("remove_patterns_backward", remove_backward_arguments, counts.remove_patterns_backward),
    ),
    Operation(
        "replace_patterns",
        fastkm.replace_patterns,
        lambda e: {
            "state": e.written,
            "old_weights": e.weights,
            "old_values": e.values,
            **dict(zip(("weights", "values"), definitions.new_patterns(e), strict=True)),
            "noise_var": e.noise_var,
        },
        definitions.replace_one_by_one,
        definitions.replace_normal_equations,
        "patterns",
        loop=definitions.replace_one_by_one,
        inputs=Inputs("written", ("weights", "values", "noise_var")),
        operator=Operator("replace_patterns", replace_arguments, counts.replace_patterns),
        backward=Operator("replace_patterns_backward", replace_backward_arguments, counts.replace_patterns_backward),
    ),
    Operation(
        "update_square_root",
        fastkm.update_square_root,
        lambda e: {
            "square_root_state": definitions.square_root_of(e),
            "weights": e.weights,
            "values": e.values,
            "noise_var": e.noise_var,
        },
        definitions.update_root_one_by_one,
        definitions.update_root_by_reflections,
        "patterns",
        loop=definitions.update_root_one_by_one,
        inputs=Inputs("prior", ("weights", "values", "noise_var")),
        operator=Operator("update_square_root", square_root_arguments, counts.update_square_root),
        backward=Operator(
            "update_square_root_backward", square_root_backward_arguments, counts.update_square_root_backward
        ),
    ),
    Operation(
        "filter_posterior",
        fastkm.filter_posterior,
        lambda e: {
            "state": e.prior,
            "weights": e.weights,
            "values": e.values,
            "queries": definitions.filter_queries(e),
            "noise_var": e.noise_var,
            "retention": definitions.filter_retention(e),
            "prior_var": e.ridge,
        },
        definitions.filter_one_by_one,
        definitions.filter_normal_equations,
        "patterns",
        loop=definitions.filter_one_by_one,
        inputs=Inputs("prior", ("weights", "values", "noise_var", "ridge")),
        operator=Operator("filter_posterior", filter_arguments, counts.filter_posterior),
        backward=Operator("filter_posterior_backward", filter_backward_arguments, counts.filter_posterior_backward),
    ),
    Operation(
        "read",
        fastkm.read,
        lambda e: {"mean": e.written.mean, "queries": e.queries, "ridge": e.ridge, "num_iters": e.num_iters},
        definitions.read_literal,
        definitions.read_dual,
        "reads",
        loop=definitions.read_literal,
        inputs=Inputs("written", ("queries", "ridge")),
        operator=Operator("read", read_arguments, counts.read),
        backward=Operator("read_backward", read_backward_arguments, counts.read_backward),
    ),
    Operation(
        "solve_addressing",
        fastkm.solve_addressing,
        lambda e: {"mean": e.written.mean, "queries": e.queries, "ridge": e.ridge},
        definitions.address_primal,
        definitions.address_dual,
        "reads",
        operator=Operator("solve_addressing", addressing_arguments, counts.solve_addressing),
        value="weights",
    ),
    Operation(
        "factor_addressing",
        fastkm.factor_addressing,
        lambda e: {"mean": e.written.mean, "ridge": e.ridge},
        definitions.pseudoinverse_primal,
        definitions.pseudoinverse_dual,
        "memories",
        operator=Operator("factor_addressing", factor_arguments, counts.factor_addressing),
        compared=("pseudoinverse",),  # the order of a memory's rows changes the factor
    ),
    Operation(
        "solve_factored",
        fastkm.solve_factored,
        lambda e: {"factor": fastkm.factor_addressing(e.written.mean, e.ridge), "queries": e.queries},
        definitions.address_primal,
        definitions.address_dual,
        "reads",
        operator=Operator("solve_factored", solve_factored_arguments, counts.solve_factored),
        value="weights",
    ),
    Operation(
        "read_factored",
        fastkm.read_factored,
        lambda e: {
            "factor": fastkm.factor_addressing(e.written.mean, e.ridge),
            "queries": e.queries,
            "num_iters": e.num_iters,
        },
        definitions.read_literal,
        definitions.read_dual,
        "reads",
        loop=definitions.read_literal,
        inputs=Inputs("written", ("queries", "ridge")),
        operator=Operator("read_factored", read_factored_arguments, counts.read_factored),
        backward=Operator("read_factored_backward", read_factored_backward_arguments, counts.read_factored_backward),
    ),
    Operation(
        "attractor_read",
        fastkm.attractor_read,
        lambda e: {
            "state": e.written,
            "queries": e.queries,
            "noise_var": e.noise_var[:, 0],
            "ridge": e.ridge,
            "clean": e.clean,
            "num_iters": e.num_iters,
            "weight_var": definitions.WEIGHT_VAR,
        },
        definitions.attractor_primal,
        definitions.attractor_dual,
        "reads",
    ),
    Operation(
        "kl_memory",
        fastkm.kl_memory,
        lambda e: {"state": e.written, "prior": e.prior},
        lambda e: {"value": reference.kl_memory(*e.written, *e.prior)[0]},
        definitions.kl_memory_by_eigenvalues,
        "memories",
        operator=Operator("kl_memory", kl_arguments, counts.kl_memory),
        backward=Operator("kl_memory_backward", kl_backward_arguments, counts.kl_memory_backward),
    ),
    Operation(
        "kl_memory_deepmind",
        fastkm.kl_memory,
        lambda e: {"state": e.written, "prior": e.prior, "method": "deepmind"},
        lambda e: {"value": reference.kl_memory_deepmind(*e.written, *e.prior)},
        definitions.kl_memory_of_diagonals,
        "memories",
    ),
    Operation(
        "logdet",
        logdet,
        lambda e: {"cov": e.written.cov},
        lambda e: {"value": reference.logdet(e.written.cov)[0]},
        lambda e: {"value": torch.linalg.eigvalsh(e.written.cov).log().sum(-1)},
        "memories",
        operator=Operator("logdet", logdet_arguments, counts.logdet),
        backward=Operator("logdet_backward", logdet_backward_arguments, counts.logdet_backward),
    ),
)

OPERATIONS = {op.name: op for op in ENTRIES}
KERNEL_OPERATIONS = tuple(op.name for op in ENTRIES if op.operator)  # those with a registered operator of their own
OPERATORS = {
    operator.name: operator for op in ENTRIES for operator in (op.operator, op.backward, *op.parts) if operator
}


def _operators_of(names: tuple[str, ...]) -> tuple[str, ...]:
    entries = (op for op in ENTRIES if op.name in names)
    return tuple(each.name for op in entries for each in (op.operator, op.backward) if each)


def _on_gpus(name: str, backend: str) -> bool:
    capability = dispatch.CAPABILITIES[name].get(backend)
    return capability is not None and "cuda" in capability.devices


# Those that GPUs have kernels for: all in Triton, most in CUDA.
GPU_OPERATIONS = tuple(name for name in KERNEL_OPERATIONS if _on_gpus(name, "triton"))
GPU_OPERATORS = _operators_of(GPU_OPERATIONS)
CUDA_OPERATORS = _operators_of(tuple(name for name in KERNEL_OPERATIONS if _on_gpus(name, "native")))


# ---- cases ---------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """An operation alone or with its gradient: what is verified, timed and counted."""

    operation: str
    gradient: bool = False

    def __str__(self) -> str:
        """What tables print."""
        return f"{self.operation} + ∇" if self.gradient else self.operation

    @property
    def operators(self) -> tuple[Operator, ...]:
        """The registered operators that a call of the case runs."""
        op = OPERATIONS[self.operation]
        return tuple(operator for operator in (op.operator, op.backward if self.gradient else None) if operator)


class Computation(NamedTuple):
    """A case as verification and timing see it."""

    bind: Callable[..., Callable[[], Any]]  # episode and backend to a call; options are passed on
    fields: Callable[[Any], Result]  # of what the call returns
    definition: Callable[[Episode], Result]
    other: Callable[[Episode], Result]
    loop: Callable[[Episode], object] | None

    def run(self, e: Episode, backend: str | None, **options: Any) -> Result:
        return self.fields(self.bind(e, backend, **options)())


@cache
def computation(case: Case) -> Computation:
    op = OPERATIONS[case.operation]
    if not case.gradient:
        return Computation(op.bind, op.fields, op.definition, op.other, op.loop)
    if op.inputs is None:
        raise ValueError(f"{op.name} has no gradient case")
    differentiated = partial(gradient_of, inputs=op.inputs)

    def comparable(form: Callable[[Episode], Result]) -> Callable[[Episode], Result]:
        form = differentiated(form)
        return lambda e: symmetric(form(e))

    run = differentiated(op.run)
    return Computation(
        lambda e, backend, **options: partial(run, e, backend, **options),
        symmetric,
        comparable(op.definition),
        comparable(op.other),
        differentiated(op.definition) if op.loop else None,
    )


CASES = tuple(Case(op.name) for op in ENTRIES)
GRADIENT_CASES = tuple(Case(op.name, True) for op in ENTRIES if op.inputs)
