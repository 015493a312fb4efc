"""The machine code of the CUDA kernels in the extension keeps to its budgets. Nothing is run."""

from pathlib import Path

import cuda_code
import pytest
from cuda_code import TARGETS, built, kernels, name_of, occupancy

pytestmark = pytest.mark.skipif(cuda_code.unavailable() is not None, reason=str(cuda_code.unavailable()))

FAMILIES = {
    *("update_kernel", "update_backward_kernel", "write_kernel", "write_backward_kernel"),
    *("remove_kernel", "remove_backward_kernel"),
    *("filter_kernel", "filter_backward_kernel"),
    *("read_kernel", "read_factored_kernel", "read_backward_kernel"),
    *("kl_kernel", "kl_backward_kernel", "logdet_kernel", "logdet_backward_kernel"),
}


@pytest.mark.parametrize("target", built())
def test_machine_code_keeps_to_the_budgets(target):
    found = kernels(target)
    assert {code.kernel.partition("<")[0] for code in found} == FAMILIES
    broken = [
        f"{what}: {code}"
        for code in found
        for what, wrong in (
            ("spills", code.spills > 0),
            ("float atomics", code.float_atomics > 0),
            ("no 128-bit loads", code.wide_loads == 0),
            ("no tensor cores", "ieee" not in code.kernel and multiplies(code.kernel) and code.tensor_cores == 0),
            ("tensor cores where float32 is asked for", "ieee" in code.kernel and code.tensor_cores > 0),
        )
        if wrong
    ]
    assert not broken, "\n".join(broken)


def multiplies(kernel: str) -> bool:
    """Whether a kernel multiplies with codes."""
    return not kernel.startswith(("kl_", "logdet_"))


@pytest.mark.parametrize("target", [target for target in built() if target in TARGETS])
def test_the_page_lists_every_kernel(target):
    page = (Path(__file__).parents[1] / "docs" / "results" / "kernels.md").read_text()
    missing = [code.kernel for code in kernels(target) if f"| `{code.kernel}` | CUDA | {target} |" not in page]
    assert not missing, f"run make kernels: {', '.join(missing)}"


def test_occupancy_is_that_of_the_programming_guide():
    # in turn limited by threads, registers and shared memory
    assert occupancy("sm_90", 32, 256, 0) == 1
    assert occupancy("sm_90", 128, 256, 0) == 0.25
    assert occupancy("sm_90", 32, 256, 227 * 1024) == 0.125
    assert occupancy("sm_80", 32, 256, 81 * 1024) == 0.25
    assert occupancy("sm_80", 32, 256, 82 * 1024) == 0.125
    assert occupancy("sm_80", 16, 32, 0) == 0.5


def test_kernel_names_are_read_from_mangled_ones():
    unit = "_ZN6fastkm50_GLOBAL__N__7a475a57_17_posterior_cuda_cu_6f5bc9e6"
    assert name_of(f"{unit}13update_kernelILNS0_5CoresE1ELi128EEEvNS_13Pos") == "update_kernel<tensor, 128>"
    assert name_of(f"{unit}12write_kernelILb0EEEvNS_11WritingArgsIfEE") == "write_kernel<0>"
    assert name_of(f"{unit}22logdet_backward_kernelENS_16MatrixNormalArgsIfEE") == "logdet_backward_kernel"
