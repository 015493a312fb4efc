"""MemoryState: two tensors, moved and cast as such, and a file that holds nothing else."""

import oracle
import pytest
import torch
from oracle import LAYOUTS, poisoned, problem

import fastkm
from fastkm import MemoryState, load_memory_state, save_memory_state


def test_a_state_is_a_pair():
    state = problem(2, 1, 1, 3, 4).state
    assert MemoryState._fields == ("mean", "cov")
    mean, cov = state
    assert mean is state.mean
    assert cov is state.cov


def test_a_state_can_be_cast_and_moved():
    p = problem(2, 3, 1, 4, 5)
    single = MemoryState(*(x.float() for x in p.state))
    result = fastkm.write(single, p.values.float(), 1.0, 1.0)
    assert result.state.mean.dtype == torch.float32
    moved = torch.utils._pytree.tree_map(lambda x: x.to("meta"), p.state)
    assert isinstance(moved, MemoryState)
    assert moved.mean.device.type == moved.cov.device.type == "meta"


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 1), (0, 3, 4), (2, 3, 0)], ids=str)
def test_a_saved_state_comes_back(shape, tmp_path, dtype):
    B, K, C = shape
    state = problem(B, 1, 1, K, C, dtype).state
    save_memory_state(state, tmp_path / "memory.safetensors")
    loaded = load_memory_state(tmp_path / "memory.safetensors")
    assert isinstance(loaded, MemoryState)
    assert oracle.equal(loaded, state)
    assert loaded.mean.dtype == loaded.cov.dtype == dtype


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_values_are_saved(layout, tmp_path):
    state = problem(2, 1, 1, 3, 4).state
    hostile = MemoryState(*(poisoned(x, layout) for x in state))
    save_memory_state(hostile, str(tmp_path / "memory.safetensors"))
    assert oracle.equal(load_memory_state(str(tmp_path / "memory.safetensors")), state)
    assert (tmp_path / "memory.safetensors").stat().st_size < 1024


def test_an_expanded_state_and_one_in_shared_storage_can_be_saved(tmp_path):
    one = problem(1, 1, 1, 4, 4).state
    storage = torch.stack([one.mean, one.cov])
    for state in (
        MemoryState(*(x.expand(3, 4, 4) for x in one)),
        MemoryState(storage[0], storage[1]),
    ):
        save_memory_state(state, tmp_path / "memory.safetensors")
        assert oracle.equal(load_memory_state(tmp_path / "memory.safetensors"), state)


def test_a_loaded_state_goes_on_being_written(tmp_path):
    p = problem(2, 6, 1, 5, 4)
    whole = fastkm.write(p.state, p.values, p.noise_var, p.ridge)
    first = fastkm.write(p.state, p.values[:, :3], p.noise_var[:, :3], p.ridge)
    save_memory_state(first.state, tmp_path / "memory.safetensors")
    state = load_memory_state(tmp_path / "memory.safetensors")
    rest = fastkm.write(state, p.values[:, 3:], p.noise_var[:, 3:], p.ridge)
    oracle.assert_close(rest.state.mean, whole.state.mean)
    oracle.assert_close(rest.state.cov, whole.state.cov)
