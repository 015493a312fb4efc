"""Every Triton kernel compiles for every target without a GPU, and its machine code keeps to the budgets."""

import pytest

KERNELS = {
    *("logdet_kernel", "logdet_backward_kernel", "kl_memory_kernel", "kl_memory_backward_kernel"),
    *("update_kernel", "update_backward_kernel", "write_kernel", "search_backward_kernel"),
    *("filter_kernel", "filter_backward_kernel", "read_kernel", "read_backward_kernel", "factor_kernel"),
    *("pseudoinverse_kernel", "read_factored_kernel"),
}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def rows(request):
    if request.config.getoption("--kernels") != "aot":
        pytest.skip("needs --kernels=aot")
    from gpu.launches import all_rows

    return all_rows(TARGETS)


def test_every_kernel_compiles_for_every_target(rows):
    for target in TARGETS:
        assert {row.kernel for row in rows if row.target == target} >= KERNELS
    assert {row.kernel for row in rows if row.target == "sm_90"} >= {"apply_kernel"}


def test_nothing_spills(rows):
    assert not [row for row in rows if row.built.spills]


def test_no_float_atomics(rows):
    assert not [row for row in rows if row.built.float_atomics]


# A factored solve only reads the tiles of one product. On gfx942 four warps are 256 threads, and such a tile has fewer
# than four numbers for each of them.
SMALL_TILES = ("solve_factored", "gfx942")


def test_aligned_rows_are_read_128_bits_at_a_time(rows):
    aligned = [row for row in rows if row.aligned and (row.operator, row.target) != SMALL_TILES]
    assert aligned
    assert not [row for row in aligned if not row.built.wide_loads]


def test_products_that_may_be_rounded_run_on_tensor_cores(rows):
    rounded = [row for row in rows if row.precision != "ieee" and row.multiplies_codes and row.target == "sm_90"]
    assert {row.kernel for row in rounded} >= {"apply_kernel", "read_kernel", "read_backward_kernel", "filter_kernel"}
    assert not [row for row in rounded if not row.built.tensor_cores]


def test_exact_products_do_not(rows):
    """Triton's own default for float32 would be tf32."""
    exact = [row for row in rows if row.precision == "ieee" and row.target != "gfx942"]
    assert not [row for row in exact if row.built.tensor_cores]


@pytest.mark.parametrize(
    ("preset", "programs"),  # those of the apply phase: one for 32 columns
    [("L", 7), ("XL", 16), ("LLM", 24)],
)
def test_an_update_of_one_memory_is_spread_over_its_columns(request, preset, programs):
    assert max(programs_of(request, "update_posterior", preset, Q=1)) == programs


def test_many_queries_of_one_memory_fill_a_chip(request):
    factored, answered = programs_of(request, "read", "L", Q=100_000)
    assert (factored, answered) == (1, 3125)
    assert answered > 132  # multiprocessors of an H100


ONE_PROGRAM = ["write", "write_backward", "update_posterior_backward", "remove_patterns_backward", "read_backward"]


@pytest.mark.parametrize("operation", [*ONE_PROGRAM, "filter_posterior", "filter_posterior_backward"])
def test_these_take_one_program_a_memory(request, operation):
    """With few memories they leave most of a GPU idle; docs/results/kernels.md says so."""
    assert set(programs_of(request, operation, "L", Q=32)) == {1}


def programs_of(request, operation, preset, Q):
    """Of every launch for one memory."""
    if request.config.getoption("--kernels") != "aot":
        pytest.skip("needs --kernels=aot")
    from gpu import aot
    from gpu.launches import calls

    return [launch.grid[0] for launch in aot.record(calls(preset, B=1, Q=Q)[operation], "sm_90")]
