"""What public functions return, and the modules themselves, in files: torch.save, torch.export and checkpoints."""

import importlib
import inspect
import io
import pkgutil
from typing import NamedTuple

import pytest
import torch
from oracle import call, problem
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, treespec_dumps

import fastkm
from fastkm import KanervaMemory
from fastkm.models import EpisodeLoss, PatternRead
from fastkm.nn.memory import MemoryPass

ROOMS = (
    "state",
    "posterior",
    "information",
    "removal",
    "square_root",
    "filtering",
    "addressing",
    "reading",
    "writing",
    "matrix_normal",
    "nn",
    "models",
)


def named_tuples() -> set[type]:
    """Every named tuple that a module of the public API shows."""
    found = set()
    for room in ROOMS:
        package = importlib.import_module(f"fastkm.{room}")
        paths = getattr(package, "__path__", None)
        names = [m.name for m in pkgutil.iter_modules(paths) if m.name in ("api", "memory")] if paths else []
        for module in (package, *(importlib.import_module(f"fastkm.{room}.{name}") for name in names)):
            public = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
            found |= {x for x in (getattr(module, n) for n in public) if _is_named_tuple(x)}
    return found


def _is_named_tuple(x: object) -> bool:
    return inspect.isclass(x) and x is not NamedTuple and issubclass(x, tuple) and hasattr(x, "_fields")


RESULTS = sorted(named_tuples(), key=lambda cls: cls.__name__)


def test_the_search_finds_them():
    assert {fastkm.MemoryState, fastkm.WriteResult, fastkm.ReadResult, fastkm.AttractorResult} < set(RESULTS)
    assert {fastkm.FilterResult, fastkm.PosteriorUpdate, MemoryPass, EpisodeLoss, PatternRead} < set(RESULTS)


@pytest.mark.parametrize("cls", RESULTS)
def test_every_result_is_loaded_and_exported(cls):
    """torch.load with weights_only, its default, and the tree of torch.export."""
    x = cls(*map(torch.tensor, range(len(cls._fields))))
    file = io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["x"]
    assert type(loaded) is cls
    assert loaded == x
    assert f"fastkm.{cls.__name__}" in treespec_dumps(tree_flatten(x)[1])


def test_a_result_of_results():
    p, file = problem(2, 3, 2, 4, 5), io.BytesIO()
    x = call("write", p, None)
    torch.save(x, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert (type(loaded), type(loaded.state)) == (fastkm.WriteResult, fastkm.MemoryState)
    assert all(map(torch.equal, tree_leaves(loaded), tree_leaves(x)))


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_checkpoints_without_an_axis_still_load(learned, inside):
    """Version 0.1 held the logarithms of the variances as 0-d tensors."""
    memory = KanervaMemory(5, 3, learn_obs_noise=learned)
    module = nn.ModuleDict({"memory": memory}) if inside else memory
    with torch.no_grad():
        memory.prior_log_var.fill_(0.5), memory.log_weight_stddev.fill_(-2), memory.log_noise_stddev.fill_(0.25)
    state = module.state_dict()
    old = {name: x.reshape(()) if x.shape == (1,) else x for name, x in state.items()}
    assert [x.dim() for x in old.values()].count(0) == 3
    other = KanervaMemory(5, 3, learn_obs_noise=learned)
    (nn.ModuleDict({"memory": other}) if inside else other).load_state_dict(old)
    for name, x in memory.state_dict().items():
        assert torch.equal(other.state_dict()[name], x), name
    assert all(x.dim() == 0 for name, x in old.items() if not name.endswith("prior_mean")), "the caller's dict is his"


def test_no_parameter_is_0d():
    """fully_shard takes none."""
    assert all(x.dim() for x in KanervaMemory(5, 3, learn_obs_noise=True).parameters())


def test_the_variances_are_0d():
    memory = KanervaMemory(5, 3)
    assert memory.noise_var.shape == memory.ridge.shape == memory.weight_var.shape == ()
