"""Every Triton kernel compiles for GPUs that are not there, and its machine code keeps to the budgets."""

import pytest

SMALL = ("S", {"B": 256, "Q": 32})
# Preset, options of the call, and the operators of it that add something; all of them on every target at preset S.
MORE = [
    ("L", {"B": 2, "Q": 100}, ("update_posterior", "write", "read", "solve_factored", "kl_memory")),
    ("L", {"B": 2, "Q": 100, "precision": 2}, ("update_posterior", "write", "read", "read_backward")),
    ("L", {"B": 2, "Q": 100, "precision": 1}, ("update_posterior", "read")),
    ("LLM", {"B": 2, "Q": 100}, ("update_posterior", "write", "read")),
    ("M", {"B": 256, "Q": 32, "squared_gram": True}, ("read", "read_backward", "write")),
]


@pytest.fixture(scope="module")
def aot(request):
    if request.config.getoption("--kernels") != "aot":
        pytest.skip("needs --kernels=aot")
    from gpu import aot

    return aot


def cases(everything: bool):
    from gpu.launches import calls

    yield from calls(SMALL[0], **SMALL[1]).items()
    for preset, options, names in MORE if everything else ():
        made = calls(preset, **options)
        yield from ((name, made[name]) for name in names)


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_machine_code_keeps_to_the_budgets(aot, target):
    broken, seen = [], set()
    for operator, call in cases(everything=target in ("sm_80", "sm_90")):
        for launch in aot.record(call, target):
            built = aot.build(launch, target)
            about = f"{operator}: {launch.name} {launch.constexprs} for {target}: {built}"
            seen.add(launch.name)
            if built.spills:
                broken.append(f"spills, {about}")
            if built.float_atomics:
                broken.append(f"float atomics, {about}")
            if "ALIGNED" in launch.kernel.arg_names and not built.wide_loads:
                broken.append(f"no 128-bit load, {about}")
            rounded = {"tf32", "tf32x3"} & {value for value in launch.constexprs.values() if isinstance(value, str)}
            multiplies_codes = launch.name != "read_kernel" or launch.grid[0] > 2
            if rounded and multiplies_codes and not built.tensor_cores:
                broken.append(f"no tensor-core instruction, {about}")
    assert not broken, "\n".join(broken)
    assert len(seen) >= 12
