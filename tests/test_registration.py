"""The registered operators: what PyTorch checks of them, their fakes, and every instruction set they are built for."""

import oracle
import pytest
import torch
from oracle import EMPTY_SHAPES, SHAPES, problem
from torch._subclasses.fake_tensor import FakeTensorMode

from fastkm._runtime import dispatch, schema
from fastkm.testing import operations
from fastkm.testing.operations import KERNEL_OPERATIONS

OPERATORS = KERNEL_OPERATIONS  # the registered operator of a public function has its name
NATIVE_MISSING = pytest.mark.skipif(schema.unavailable is not None, reason=str(schema.unavailable))


def arguments(operator, p):
    return operations.OPERATORS[operator].arguments(oracle.as_operands(p, num_iters=2, num_opt_iters=2))


def op(operator):
    return getattr(torch.ops.fastkm, operator).default


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def test_every_native_capability_is_an_operator():
    made_of_others = {"attractor_read", "stream", "update_posterior_into", "write_into"}
    native = {o for o, table in dispatch.CAPABILITIES.items() if "native" in table}
    assert native - made_of_others == set(OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_change_and_alias_nothing(operator):
    schema = op(operator)._schema
    assert not schema.is_mutable
    assert all(argument.alias_info is None for argument in (*schema.arguments, *schema.returns))


@NATIVE_MISSING
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], (1, 1, 1, 1, 1), *EMPTY_SHAPES], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator, shape, masked, dtype):
    """The schema tells the truth about mutation and aliasing, and the fake about shapes, dtypes and strides."""
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op(operator), arguments(operator, problem(*shape, dtype, masked=masked)), test_utils=checks)


@NATIVE_MISSING
@pytest.mark.parametrize("layout", ["contiguous", *oracle.LAYOUTS])
@pytest.mark.parametrize("shape", [(3, 5, 7, 13, 6), (1, 70, 3, 17, 9), *EMPTY_SHAPES], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_fakes_agree_with_what_is_returned(operator, shape, layout, dtype):
    p = problem(*shape, dtype, masked=True)
    if layout != "contiguous":
        p = oracle.map_tensors(p, lambda x: oracle.poisoned(x, layout))
    real = as_tuple(op(operator)(*arguments(operator, p)))
    with FakeTensorMode() as mode:
        fake = as_tuple(op(operator)(*arguments(operator, oracle.map_tensors(p, mode.from_tensor))))
    assert [(x.shape, x.dtype, x.stride(), x.device) for x in fake] == [
        (x.shape, x.dtype, x.stride(), x.device) for x in real
    ]


@pytest.mark.parametrize("operator", OPERATORS)
def test_fakes_agree_with_the_reference(operator, dtype):
    """The fakes need no extension."""
    from fastkm.addressing.reference import factor_addressing, solve_addressing, solve_factored
    from fastkm.filtering.reference import filter_block
    from fastkm.matrix_normal.reference import kl_memory, logdet
    from fastkm.posterior.reference import update_block
    from fastkm.reading.reference import read, read_factored
    from fastkm.removal.reference import remove_block, replace_block
    from fastkm.square_root.reference import update_sequential
    from fastkm.writing.reference import write_sequential

    reference = {
        "solve_addressing": solve_addressing,
        "factor_addressing": factor_addressing,
        "solve_factored": solve_factored,
        "update_posterior": update_block,
        "remove_patterns": remove_block,
        "replace_patterns": replace_block,
        "update_square_root": update_sequential,
        "filter_posterior": filter_block,
        "write": write_sequential,
        "read": read,
        "read_factored": read_factored,
        "kl_memory": kl_memory,
        "logdet": logdet,
    }[operator]
    p = problem(3, 5, 7, 13, 6, dtype, masked=True)
    with FakeTensorMode() as mode:
        fake = op(operator)(*arguments(operator, oracle.map_tensors(p, mode.from_tensor)))
    real = reference(*arguments(operator, p))
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


@NATIVE_MISSING
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_can_be_traced(operator):
    """A graph that holds the operator as one node, and gives what the operator gives."""
    given = arguments(operator, problem(2, 3, 4, 5, 6))
    places = [i for i, x in enumerate(given) if isinstance(x, torch.Tensor)]

    def function(*tensors):
        filled = list(given)
        for i, x in zip(places, tensors, strict=True):
            filled[i] = x
        return op(operator)(*filled)

    inputs = [given[i] for i in places]
    graph = torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode="fake")(*inputs)
    assert sum(node.target == op(operator) for node in graph.graph.nodes) == 1
    for got, expected in zip(graph(*inputs), function(*inputs), strict=True):
        assert torch.equal(got, expected)


# ---------------------------------------------------------------------------------------------------- instruction sets


LEVELS = {0: "base", 1: "AVX2", 2: "AVX-512"}


@pytest.fixture
def level(request):
    """Run with the instruction set asked for, then with the highest again."""
    highest = torch.ops.fastkm.select_cpu_level(max(LEVELS))
    if highest < request.param:
        pytest.skip(
            f"{LEVELS[request.param]} is not built, or this processor lacks it (its highest is {LEVELS[highest]})"
        )
    taken = torch.ops.fastkm.select_cpu_level(request.param)
    yield taken
    assert torch.ops.fastkm.select_cpu_level(max(LEVELS)) == highest


@NATIVE_MISSING
@pytest.mark.parametrize("level", LEVELS, ids=LEVELS.values(), indirect=True)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "operation", ["solve_addressing", "update_posterior", "write", "read", "read_factored", "kl_memory"]
)
def test_every_instruction_set_is_as_good_as_the_reference(operation, shape, level, dtype):
    p = problem(*shape, dtype, masked=True)
    exact = oracle.flat(oracle.call(operation, oracle.map_tensors(p, widened), "reference"))
    oracle.judge(lambda p, b: oracle.call(operation, p, b), p, exact, "native")


@NATIVE_MISSING
@pytest.mark.parametrize("level", LEVELS, ids=LEVELS.values(), indirect=True)
@pytest.mark.parametrize(("K", "C"), [(5, 40), (16, 17), (33, 20)])
def test_many_queries_on_every_instruction_set(K, C, level, dtype):
    p = problem(2, 0, 4 * (K + C) + 5, K, C, dtype)
    exact = oracle.flat(oracle.call("read", oracle.map_tensors(p, widened), "reference"))
    oracle.judge(lambda p, b: oracle.call("read", p, b), p, exact, "native")


def widened(x):
    return x.double() if x.is_floating_point() else x


@NATIVE_MISSING
@pytest.mark.parametrize("level", LEVELS, ids=LEVELS.values(), indirect=True)
def test_the_level_asked_for_is_the_level_taken(level, request):
    assert level == request.node.callspec.params["level"]


@NATIVE_MISSING
def test_a_level_above_the_highest_gives_the_highest():
    highest = torch.ops.fastkm.select_cpu_level(max(LEVELS))
    assert torch.ops.fastkm.select_cpu_level(99) == highest
    assert highest in LEVELS


@pytest.mark.parametrize("namespace", ["fastkm", "fastkm_triton"])
def test_an_operator_refuses_tensors_of_different_devices(namespace):
    """One on the meta device, and the operator would else return memory that nobody wrote."""
    p = problem(2, 3, 3, 4, 5)
    update = getattr(torch.ops, namespace).update_posterior
    with pytest.raises(RuntimeError, match="different devices"):
        update(*p.state, p.weights, p.values, p.noise_var.to("meta"), None, 0)
