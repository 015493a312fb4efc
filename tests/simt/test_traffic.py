"""The bytes that the CUDA kernels load and store, against the least possible: every input once, every output once.

Every access is counted while the kernels run on the host with the shared memory of an H100. No cache is modelled.
"""

import json
import os
import subprocess
import sys

import pytest

from simt.build import ROOT

# How many times the least a call may move. The counts are for one thread block a memory. Thread blocks that share a
# memory each read what all of them need.
BOUNDS = {
    "S": {
        "update_posterior": 1.09,
        "update_posterior_backward": 1.20,
        "filter_posterior": 1.00,
        "filter_posterior_backward": 1.10,
        "write": 1.00,
        "write_backward": 1.20,
        "remove_patterns": 1.08,
        "remove_patterns_backward": 1.20,
        "replace_patterns": 1.13,  # the memory between the two is neither an argument nor a result
        "replace_patterns_backward": 1.61,
        "read": 1.00,
        "read_backward": 1.38,
        "solve_addressing": 1.00,
        "factor_addressing": 1.00,
        "solve_factored": 1.00,
        "read_factored": 1.00,
        "read_factored_backward": 1.38,
        "kl_memory": 1.00,
        "kl_memory_backward": 1.14,
        "logdet": 1.00,
        "logdet_backward": 1.14,
    },
}


@pytest.mark.parametrize("preset", BOUNDS)
def test_kernels_move_little_more_than_the_least(preset):
    command = [sys.executable, ROOT / "tools/kernel_table.py", "traffic", preset]
    one_block_a_memory = os.environ | {"FASTKM_SIMT_SMS": "1"}
    done = subprocess.run(command, env=one_block_a_memory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    times = {row[0].strip("`"): float(row[-1]) for row in json.loads(done.stdout)}
    assert times.keys() == BOUNDS[preset].keys()
    more = {name: ratio for name, ratio in times.items() if ratio > BOUNDS[preset][name]}
    assert not more, f"times the least: {more}"
