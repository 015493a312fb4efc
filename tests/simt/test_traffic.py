"""What the CUDA kernels ask memory for, against the least possible: every input once, every output once.

Every access is counted while the kernels run on the host, with the shared memory of an H100. There is no cache in it.
"""

import json
import os
import subprocess
import sys

import pytest

from simt.build import ROOT

# How many times the least a call may ask for. Where memories alone fill the chip an update gives each one block; with
# fewer, blocks share a memory and each reads what all of them need.
BOUNDS = {
    "S": {
        "update_posterior": 1.09,
        "update_posterior_backward": 1.20,
        "write": 1.00,
        "write_backward": 1.20,
        "read": 1.00,
        "read_backward": 1.38,
        "solve_addressing": 1.00,
        "factor_addressing": 1.00,
        "solve_factored": 1.00,
        "kl_memory": 1.00,
        "kl_memory_backward": 1.14,
        "logdet": 1.00,
        "logdet_backward": 1.14,
    },
}


@pytest.mark.parametrize("preset", BOUNDS)
def test_kernels_ask_for_little_more_than_the_least(preset):
    command = [sys.executable, ROOT / "tools/kernel_table.py", "traffic", preset]
    one_block_a_memory = os.environ | {"FASTKM_SIMT_SMS": "1"}
    done = subprocess.run(command, env=one_block_a_memory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    times = {row[0].strip("`"): float(row[-1]) for row in json.loads(done.stdout)}
    assert times.keys() == BOUNDS[preset].keys()
    more = {name: ratio for name, ratio in times.items() if ratio > BOUNDS[preset][name]}
    assert not more, f"times the least: {more}"
