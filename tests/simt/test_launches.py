"""How many launches a call makes, and of how many blocks: the launchers say it themselves, for an H100 not there."""

import json
import subprocess
import sys

import pytest

from simt.build import ROOT

MULTIPROCESSORS = 132
# Launches where a memory has more rows than one block factors on chip: the factor, and what uses it.
TWO_BEYOND = ("update_posterior", "read", "read_backward", "solve_addressing", "solve_factored")

# In a process of its own: operators are registered once.
SCRIPT = """
import json, sys
sys.path.insert(0, "tools")
from kernel_table import OPERATORS, PRESETS, Preset, QUERIES, Recorder, inputs
recorder = Recorder()
def launches(operator, preset, batch, queries=QUERIES):
    found = recorder.launches(operator, inputs(operator, preset, batch, queries, 0, "cpu"), "sm_90")
    return [launch.blocks for launch in found]
print(json.dumps({
    "calls": {o: {name: launches(o, preset, 1) for name, preset in PRESETS.items()} for o in OPERATORS},
    "wide": launches("update_posterior", Preset("wide", 128, 64 * 132, 16), 1),
    "queries": launches("read", PRESETS["L"], 1, 100_000),
    "memories": {o: launches(o, Preset("tiny", 4, 4, 2), 70_000, 2) for o in OPERATORS},
}))
"""


@pytest.fixture(scope="module")
def told(request):
    if request.config.getoption("--kernels") != "simt":
        return {}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_one_launch_up_to_the_preset_l_and_at_most_two_beyond(told):
    for operator, calls in told["calls"].items():
        for preset, launches in calls.items():
            beyond = preset in ("XL", "LLM") and operator in TWO_BEYOND
            assert len(launches) == 1 + beyond, f"{operator} {preset}: {launches}"


def test_one_memory_fills_the_chip_over_tiles_of_columns(told):
    assert told["calls"]["update_posterior"]["L"] == [4]  # tiles of 64 columns in C = 200
    assert told["calls"]["update_posterior"]["LLM"] == [1, 12]  # C = 768, behind one factor
    assert told["wide"] == [MULTIPROCESSORS]


def test_one_memory_fills_the_chip_over_queries(told):
    assert told["queries"] == [MULTIPROCESSORS]


def test_grids_do_not_grow_with_the_batch(
    told,
):  # which may be more than the 65,535 that an axis but the first can have
    for operator, launches in told["memories"].items():
        assert launches, operator
        assert all(0 < blocks <= MULTIPROCESSORS for blocks in launches), f"{operator}: {launches}"
