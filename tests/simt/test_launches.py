"""How many launches a call makes, and of how many thread blocks. The launchers report it for a simulated H100."""

import json
import subprocess
import sys

import pytest

from simt.build import ROOT

MULTIPROCESSORS = 132
# Operators that make two launches where a memory has more rows than a thread block factors on chip.
TWO_BEYOND = (
    *("update_posterior", "remove_patterns", "read", "read_backward", "solve_addressing"),
    *("factor_addressing", "read_factored_backward"),
)  # Operators that are several others, one after the other.
MADE_OF = {
    "replace_patterns": ("update_posterior", "remove_patterns"),
    "replace_patterns_backward": ("update_posterior", "remove_patterns_backward", "update_posterior_backward"),
}

# In a process of its own: operators are registered once.
SCRIPT = """
import json, sys
sys.path.insert(0, "tools")
from kernel_table import CUDA_OPERATORS, PRESETS, Preset, QUERIES, Recorder, inputs
recorder = Recorder()
def launches(operator, preset, batch, queries=QUERIES):
    found = recorder.launches(operator, inputs(operator, preset, batch, queries, 0, "cpu"), "sm_90")
    return [launch.blocks for launch in found]
print(json.dumps({
    "calls": {o: {name: launches(o, preset, 1) for name, preset in PRESETS.items()} for o in CUDA_OPERATORS},
    "wide": launches("update_posterior", Preset("wide", 128, 64 * 132, 16), 1),
    "queries": launches("read", PRESETS["L"], 1, 100_000),
    "memories": {o: launches(o, Preset("tiny", 4, 4, 2), 70_000, 2) for o in CUDA_OPERATORS},
}))
"""


@pytest.fixture(scope="module")
def recorded(request):
    if request.config.getoption("--kernels") != "simt":
        return {}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_one_launch_up_to_the_preset_l_and_at_most_two_beyond(recorded):
    for operator, calls in recorded["calls"].items():
        for preset, launches in calls.items():
            parts = MADE_OF.get(operator, (operator,))
            beyond = sum(part in TWO_BEYOND for part in parts) if preset in ("XL", "LLM") else 0
            assert len(launches) == len(parts) + beyond, f"{operator} {preset}: {launches}"


def test_one_memory_fills_the_chip_over_tiles_of_columns(recorded):
    assert recorded["calls"]["update_posterior"]["L"] == [4]  # tiles of 64 columns in C = 200
    assert recorded["calls"]["update_posterior"]["LLM"] == [1, 12]  # C = 768, behind one factor
    assert recorded["calls"]["remove_patterns"] == recorded["calls"]["update_posterior"]
    assert recorded["wide"] == [MULTIPROCESSORS]


def test_one_memory_fills_the_chip_over_queries(recorded):
    assert recorded["queries"] == [MULTIPROCESSORS]


def test_grids_do_not_grow_with_the_batch(recorded):
    # 70,000 memories are more than the 65,535 blocks that the second and third axis of a grid can have.
    for operator, launches in recorded["memories"].items():
        assert launches, operator
        assert all(0 < blocks <= MULTIPROCESSORS for blocks in launches), f"{operator}: {launches}"
