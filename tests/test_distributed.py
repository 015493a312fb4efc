"""Memories on several processes equal memories on one, and what is wrong on one rank is an error on every rank.

Each group of processes runs many checks, because it takes seconds to start.
"""

import itertools
import math
import os
import runpy
import time
import traceback
from datetime import timedelta
from pathlib import Path

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from oracle import problem
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributions import Independent, Normal
from torch.nn.parallel import DistributedDataParallel

import fastkm
from fastkm import KanervaMemory, MemoryState, distributed
from fastkm._runtime.errors import BackendUnavailableError
from fastkm.distributed.gram import Gram, SquareRoot
from fastkm.distributed.ranks import BLOCK, LENGTH, Ranks, Share, checksum
from fastkm.models import DynamicKanervaMachine

TIMEOUT = timedelta(seconds=20)
# B, T, Q, K, C: as many columns as rows and patterns, and fewer, which leave G without full rank.
SHAPES = [(3, 4, 2, 5, 20), (2, 7, 3, 8, 6), (2, 33, 5, 31, 97)]


def start(rank, size, meet):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size, timeout=TIMEOUT)


def run_checks(rank, size, folder):
    """A process of a group: every check of CHECKS[size], and what failed in which."""
    start(rank, size, f"{folder}/meet{size}")
    failed = {}
    for check in CHECKS[size]:
        try:
            check(rank, size, folder)
        except (AssertionError, pytest.fail.Exception):
            failed[check.__name__] = traceback.format_exc()
        dist.barrier()
    torch.save(failed, f"{folder}/failed{size}{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """By the name of a check: how it failed, on each rank where it did."""
    folder = tmp_path_factory.mktemp("ranks")
    found = {}
    for size in CHECKS:  # the second group loads what the first has saved
        mp.spawn(run_checks, (size, str(folder)), nprocs=size)
        for rank in range(size):
            for name, how in torch.load(folder / f"failed{size}{rank}").items():
                found.setdefault(name, []).append(f"rank {rank} of {size}:\n{how}")
    return found


def columns_of(rank, size, C):
    """Uneven shards: one rank of three has none where columns are few."""
    ends = [*(C * part // 20 for part in ((2, 11) if size == 3 else (7,))), C]
    return slice(0 if rank == 0 else ends[rank - 1], ends[rank])


def shard(p, rank, size):
    mine = columns_of(rank, size, p.values.shape[-1])
    state = MemoryState(p.state.mean[..., mine], p.state.cov)
    return p._replace(state=state, values=p.values[..., mine], queries=p.queries[..., mine])


SHARDED = {
    "write": lambda p: distributed.write_sharded(p.state, p.values, p.noise_var, p.ridge, mask=p.mask),
    "write, n = 3": lambda p: distributed.write_sharded(
        p.state, p.values, p.noise_var, p.ridge, num_opt_iters=3, mask=p.mask
    ),
    "read": lambda p: distributed.read_sharded(p.state.mean, p.queries, p.ridge, num_iters=3),
    "read, factored": lambda p: distributed.read_factored_sharded(
        distributed.factor_sharded(p.state.mean, p.ridge), p.queries, num_iters=3
    ),
    "update": lambda p: distributed.update_sharded(p.state, p.weights, p.values, p.noise_var, mask=p.mask),
    "filter": lambda p: distributed.filter_sharded(
        p.state, p.weights, p.values, p.weights.flip(1), p.noise_var, retention=0.9, mask=p.mask
    ),
}
WHOLE = {
    "write": lambda p, backend=None: fastkm.write(
        p.state, p.values, p.noise_var, p.ridge, mask=p.mask, backend=backend
    ),
    "write, n = 3": lambda p, backend=None: fastkm.write(
        p.state, p.values, p.noise_var, p.ridge, num_opt_iters=3, mask=p.mask, backend=backend
    ),
    "read": lambda p, backend=None: fastkm.read(p.state.mean, p.queries, p.ridge, num_iters=3, backend=backend),
    "read, factored": lambda p, backend=None: fastkm.read(
        p.state.mean, p.queries, p.ridge, num_iters=3, backend=backend
    ),
    "update": lambda p, backend=None: fastkm.update_posterior(
        p.state, p.weights, p.values, p.noise_var, mask=p.mask, backend=backend
    ),
    "filter": lambda p, backend=None: fastkm.filter_posterior(
        p.state, p.weights, p.values, p.weights.flip(1), p.noise_var, retention=0.9, mask=p.mask, backend=backend
    ),
}
SMALL = "write by a small memory"


def by_small_memory(p):
    """As every write that wants a gradient or runs on a GPU."""
    return distributed.write_sharded(p.state, p.values, p.noise_var, p.ridge, mask=p.mask, backend="reference")


SPLIT = ("mean", "values")  # fields of which a rank has its own columns


def own_columns(truth, rank, size, C):
    """What a rank should have of the truth of one process."""
    mine = columns_of(rank, size, C)
    return {name: x[..., mine] if name in SPLIT else x for name, x in truth.items()}


# ---- three ranks, uneven ---------------------------------------------------------------------------------------------


def shards_equal_one_process_in_float64(rank, size, folder):
    for sizes in SHAPES:
        for masked in (False, True):
            p = problem(*sizes, masked=masked)
            for name, run in SHARDED.items():
                found = run(shard(p, rank, size))
                truth = own_columns(oracle.flat(WHOLE[name](p)), rank, size, sizes[-1])
                for field, x in oracle.flat(found).items():
                    scale = float(sizes[-1]) if field == "kl" else oracle.largest(p.values)
                    oracle.assert_close(x, truth[field], f"{name} {sizes} {field}", scale=scale)


def shards_are_as_exact_as_the_literal_loop_in_float32(rank, size, folder):
    """Twice its error, and the rounding of a sum over ranks."""
    for sizes in SHAPES:
        p = problem(*sizes)
        narrow = oracle.map_tensors(p, torch.Tensor.float)
        exact = oracle.map_tensors(narrow, torch.Tensor.double)
        for name, run in SHARDED.items():
            truth = oracle.flat(WHOLE[name](exact, "reference"))
            errors = oracle.reference_errors(lambda q, backend, name=name: WHOLE[name](q, backend), narrow, truth, 4)
            found = oracle.flat(run(shard(narrow, rank, size)))
            for field, x in own_columns(truth, rank, size, sizes[-1]).items():
                scale = max(oracle.largest(truth[field]), sizes[-1] if field == "kl" else 0)
                bound = 2 * (errors[field] + size * torch.finfo(torch.float32).eps * scale)
                assert oracle.error(found[field], x) <= bound, f"{name} {sizes} {field}"


def what_is_ill_conditioned_keeps_its_digits(rank, size, folder):
    """Rows or patterns that are nearly the same: float32 inner products do not hold their difference."""
    p = problem(2, 8, 1, 16, 200)
    p.state.mean[:, 1] = p.state.mean[:, 0] + 1e-3 * p.state.mean[:, 2]
    rows = p._replace(ridge=torch.full((2,), 1e-6, dtype=torch.float64))
    p = problem(2, 13, 1, 20, 50)
    patterns = p._replace(values=15 * (p.values[:, :1] + 1e-3 * p.values), ridge=torch.full_like(p.ridge, 7.0))
    for p, names in ((rows, ("write", SMALL, "read", "read, factored")), (patterns, ("write", SMALL))):
        narrow = oracle.map_tensors(p, torch.Tensor.float)
        exact = oracle.map_tensors(narrow, torch.Tensor.double)
        C = p.values.shape[-1]
        for name in names:
            mine, kind = shard(narrow, rank, size), "write" if name == SMALL else name
            truth = own_columns(oracle.flat(WHOLE[kind](exact, "reference")), rank, size, C)
            for field, x in oracle.flat(by_small_memory(mine) if name == SMALL else SHARDED[name](mine)).items():
                bound = 1e-5 * max(oracle.largest(truth[field]), C * (field == "kl"))
                assert oracle.error(x, truth[field]) <= bound, f"{name} {field}"


def what_every_rank_has_is_the_same_bit_by_bit(rank, size, folder):
    p = oracle.map_tensors(problem(*SHAPES[-1], masked=True), lambda x: x if x.dtype == torch.bool else x.float())
    for name, run in SHARDED.items():
        fields = oracle.flat(run(shard(p, rank, size)))
        told = [None] * size
        dist.all_gather_object(told, {field: x for field, x in fields.items() if field not in SPLIT})
        for field, x in fields.items():
            assert field in SPLIT or all(torch.equal(x, other[field]) for other in told), f"{name} {field}"


def differentiated(run, p, share):
    """The gradient of a loss of every field, of which ``share`` is the part that belongs to this rank."""
    leaves = oracle.map_tensors(p._replace(mask=None), lambda x: x.clone().requires_grad_())
    inputs = oracle.tensors(leaves)
    found = oracle.flat(run(leaves._replace(mask=p.mask)))
    loss = sum((x * share(name, x)).sum() for name, x in found.items())
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]


def gradients_equal_those_of_one_process(rank, size, folder):
    """The loss is the sum of those of all ranks; what every rank has alike is counted once, as a third on each."""
    for sizes in SHAPES:
        C = sizes[-1]
        p = problem(*sizes, masked=True)

        def factors(name, x, C=C):
            rows = x.shape[:-1] if name in SPLIT else x.shape
            shape = (*rows, C) if name in SPLIT else rows
            return torch.linspace(-1, 2, math.prod(shape), dtype=x.dtype).view(shape)

        def share(name, x, C=C, factors=factors):
            whole = factors(name, x)
            return whole[..., columns_of(rank, size, C)] if name in SPLIT else whole / size

        for name, run in SHARDED.items():
            truth = differentiated(WHOLE[name], p, factors)
            found = differentiated(run, shard(p, rank, size), share)
            for place, (got, expected) in enumerate(zip(found, truth, strict=True)):
                if place in (0, 3, 4):  # mean, values, queries
                    expected = expected[..., columns_of(rank, size, C)]
                else:
                    dist.all_reduce(got)
                if place == 1:
                    got, expected = got + got.mT, expected + expected.mT
                scale = max(map(oracle.largest, truth))
                oracle.assert_close(got, expected, f"{name} {sizes} input {place}", scale=scale)


def pooled_patterns_are_those_of_one_process(rank, size, folder):
    """However the patterns are split: one rank has none, and noise may be each rank's own."""
    for dtype in (torch.float64, torch.float32):
        p = oracle.map_tensors(problem(2, 33, 1, 31, 20), lambda x, dtype=dtype: x.to(dtype))
        mine = [slice(0, 5), slice(5, 33), slice(0, 0)][rank]
        whole = fastkm.update_posterior(p.state, p.weights, p.values, p.noise_var).state
        noise_var = p.noise_var[:, mine]
        found = distributed.update_pooled(p.state, p.weights[:, mine], p.values[:, mine], noise_var)
        for x, expected in zip(found, whole, strict=True):
            oracle.assert_close(x, expected, scale=1.0)
        mask = torch.ones_like(noise_var, dtype=torch.bool)
        masked = distributed.update_pooled(p.state, p.weights[:, mine], p.values[:, mine], noise_var, mask=~mask)
        for x, expected in zip(masked, p.state, strict=True):
            oracle.assert_close(x, expected)


def written_from_one_prior(dtype):
    p = oracle.map_tensors(problem(2, 12, 1, 6, 9), lambda x: x.to(dtype))
    parts = [slice(0, 3), slice(3, 4), slice(4, 12)]
    return p.state, [
        fastkm.update_posterior(p.state, p.weights[:, part], p.values[:, part], p.noise_var[:, part]).state
        for part in parts
    ]


def bounds_of_merging(prior, states, merged):
    """How far two orders of one sum may bring the mean and the covariance of a merged memory apart.

    With u the unit roundoff of float64 and m memories, two sums of ``Λ_0`` and the ``Λ_i − Λ_0`` differ by at most
    2 (m + 1) u times the sum of the norms of their terms, and likewise η. A Cholesky solve with Λ is that of a system
    within 4 K (3 K + 1) u ‖Λ‖ of it (Higham, Accuracy and Stability, theorem 10.4); either side solves once, and forms
    each Λ_i likewise, so that this counts m + 2 times. A change δΛ moves U = Λ⁻¹ by ‖U‖² ‖δΛ‖ and R = U η by
    ‖U‖ (‖δη‖ + ‖δΛ‖ ‖R‖), to first order; the factor 2 is for the rest. A float32 result is rounded to half a unit on
    either side.
    """
    K, m = prior.mean.shape[1], len(states)
    unit = torch.finfo(torch.float64).eps / 2
    wide = [MemoryState(*(x.double() for x in state)) for state in (prior, *states, merged)]
    precisions = [torch.cholesky_inverse(torch.linalg.cholesky(state.cov)) for state in wide]
    informations = [precision @ state.mean for precision, state in zip(precisions, wide, strict=True)]

    def norm(x):
        return torch.linalg.matrix_norm(x).amax()

    def sums(forms):
        return sum(norm(x) + norm(x - forms[0]) for x in forms[:-1])

    solves = 4 * K * (3 * K + 1) * (m + 2) * unit
    of_precision = 2 * (m + 1) * unit * sums(precisions) + solves * sums(precisions)
    of_information = 2 * (m + 1) * unit * sums(informations) + solves * sums(informations)
    cov, mean = norm(wide[-1].cov), norm(wide[-1].mean)
    bounds = 2 * cov * (of_information + of_precision * mean), 2 * cov**2 * of_precision
    rounding = torch.finfo(merged.mean.dtype).eps if merged.mean.dtype == torch.float32 else 0.0
    return [(bound + rounding * x.abs().max()).item() for bound, x in zip(bounds, merged, strict=True)]


def memories_of_all_ranks_merge_as_on_one_process(rank, size, folder):
    """Each rank has one; or one rank has two, and one has none."""
    for dtype in (torch.float64, torch.float32):
        prior, states = written_from_one_prior(dtype)
        truth = fastkm.merge_memories(states, prior)
        bounds = bounds_of_merging(prior, states, truth)
        assert max(bounds) < 1e-5 if dtype == torch.float32 else max(bounds) < 1e-8  # they say something
        splits = [([0], [1], [2]), ([0, 2], [], [1])] if size == 3 else [([0], [1, 2]), ([], [0, 1, 2])]
        for split in splits:
            mine = [states[i] for i in split[rank]]
            found = distributed.merge_memories(mine[0] if len(mine) == 1 else mine, prior)
            for x, expected, bound in zip(found, truth, bounds, strict=True):
                assert oracle.error(x, expected) <= bound
                told = [None] * size
                dist.all_gather_object(told, x)
                assert all(torch.equal(x, other) for other in told)
    numbers = sum(x.numel() for x in prior)
    assert sent(lambda: distributed.merge_memories(states[0], prior)) == {
        "all_gather": [LENGTH],
        "all_reduce": [numbers],
    }


def gradients_go_through_a_merge(rank, size, folder):
    """To the own memory of each rank; the parts that the ranks have of the gradient of the prior add up."""
    prior, states = written_from_one_prior(torch.float64)
    probes = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x) for x in prior]

    def gradients(merge, mine, weight):
        leaves = [x.clone().requires_grad_() for state in (prior, *(states[i] for i in mine)) for x in state]
        pairs = [MemoryState(*leaves[i : i + 2]) for i in range(0, len(leaves), 2)]
        merged = merge(pairs[1:], pairs[0])
        loss = weight * sum((x * probe).sum() for x, probe in zip(merged, probes, strict=True))
        found = torch.autograd.grad(loss, leaves)
        return [x + x.mT if x.shape == prior.cov.shape else x for x in found]

    truth = gradients(fastkm.merge_memories, range(3), 1.0)
    mine = ([0], [1], [2])[rank] if size == 3 else ([0], [1, 2])[rank]
    found = gradients(distributed.merge_memories, mine, 1 / size)
    for x in found[:2]:
        dist.all_reduce(x)
    expected = truth[:2] + [truth[2 + 2 * i + part] for i in mine for part in (0, 1)]
    scale = max(map(oracle.largest, truth))
    for got, true in zip(found, expected, strict=True):
        oracle.assert_close(got, true, "merge", scale=scale)


def ranks_that_disagree_do_not_merge(rank, size, folder):
    prior, states = written_from_one_prior(torch.float64)
    other = rank == 1
    cases = {
        r"prior.mean must be .* on rank 1": ([], MemoryState(prior.mean + 1, prior.cov)),
        r"prior.cov must be .* on rank 1": ([], MemoryState(prior.mean, 2 * prior.cov)),
        r"K must be .* 5 on rank 1": ([], MemoryState(prior.mean[:, 1:], prior.cov[:, 1:, 1:])),
        r"C must be .* 8 on rank 1": ([], MemoryState(prior.mean[..., 1:], prior.cov)),
        r"the dtype must be .* float32 on rank 1": ([], MemoryState(prior.mean.float(), prior.cov.float())),
        r"refused on rank 1, ValueError: states\[0\] was not": ([MemoryState(prior.mean, 2 * prior.cov)], prior),
        r"refused on rank 1, TypeError: states must be": (None, prior),
    }
    for message, wrong in cases.items():
        mine, before = wrong if other else (states[0], prior)
        with pytest.raises((TypeError, ValueError), match=f"merge_memories: {message}"):
            distributed.merge_memories(mine, before)


def a_mesh_and_a_part_of_the_ranks_are_groups(rank, size, folder):
    p = problem(*SHAPES[0])
    expected = SHARDED["read"](shard(p, rank, size))
    mesh = init_device_mesh("cpu", (size,))
    mine = shard(p, rank, size)
    found = distributed.read_sharded(mine.state.mean, mine.queries, p.ridge, num_iters=3, group=mesh)
    assert oracle.equal(found, expected)
    two = dist.new_group([0, 2])
    if rank != 1:
        half = slice(0, 3) if rank == 0 else slice(3, 20)
        found = distributed.read_sharded(p.state.mean[..., half], p.queries[..., half], p.ridge, num_iters=3, group=two)
        oracle.assert_close(found.weights, expected.weights)
    with pytest.raises((TypeError, ValueError), match="group must be"):
        distributed.read_sharded(p.state.mean, p.queries, p.ridge, group="all")


def what_ranks_disagree_about_is_named_on_every_rank(rank, size, folder):
    B, T, Q, K, C = SHAPES[0]
    usual = problem(B, T, Q, K, C)
    state, _, values, queries, noise_var, ridge, _ = usual
    wide = torch.eye(K, dtype=torch.float64).expand(B, K, K) * (1 + (rank == 1))
    cases = {
        r"B must be .*, got 3 on ranks \[0, 2\], 2 on rank 1": problem(2, T, Q, K, C),
        r"K must be .*, got 5 on ranks \[0, 2\], 6 on rank 1": problem(B, T, Q, 6, C),
        r"T must be .*, got 4 on ranks \[0, 2\], 3 on rank 1": problem(B, 3, Q, K, C),
        "the dtype must be .* float32 on rank 1": oracle.map_tensors(usual, torch.Tensor.float),
        "noise_var must be .* on rank 1": usual._replace(noise_var=noise_var.flip(1)),
        "ridge must be .* on rank 1": usual._replace(ridge=ridge * 2),
        "mask must be .*got None on ranks .* on rank 1": usual._replace(mask=torch.ones(B, T, dtype=torch.bool)),
        "state.cov must be .* on rank 1": usual._replace(state=MemoryState(state.mean, wide)),
        "refused on rank 1, ValueError: values must have shape": usual._replace(values=values[:, :, 1:]),
        "refused on rank 1, TypeError: values must be a tensor": usual._replace(values=None),
        "refused on rank 1, LinAlgError: .* not finite in memory .2.": usual._replace(values=values.clone()),
    }
    list(cases.values())[-1].values[2, 1, 1] = torch.nan
    for message, wrong in cases.items():
        p = wrong if rank == 1 else usual
        kinds = (TypeError, ValueError, torch.linalg.LinAlgError)
        with pytest.raises(kinds, match=message):
            distributed.write_sharded(p.state, p.values, p.noise_var, p.ridge, mask=p.mask)
    with pytest.raises(ValueError, match=r"the operation must be .*read_sharded on rank 1"):
        SHARDED["read" if rank == 1 else "write"](usual)
    with pytest.raises(ValueError, match=r"num_iters must be .* 3 on rank 1"):
        distributed.read_sharded(state.mean, queries, ridge, num_iters=3 if rank == 1 else 2)
    factor = distributed.factor_sharded(state.mean, ridge)
    with pytest.raises(TypeError, match=r"refused on rank 1, TypeError: factor must be a ShardedFactor"):
        distributed.read_factored_sharded(tuple(factor) if rank == 1 else factor, queries)
    with pytest.raises(ValueError, match=r"whether a gradient is wanted must be .* 1 on rank 1"):
        distributed.read_sharded(state.mean.clone().requires_grad_(rank == 1), queries, ridge)
    with pytest.raises(BackendUnavailableError, match=r"refused on rank 1, BackendUnavailableError: .*triton"):
        distributed.read_sharded(state.mean, queries, ridge, backend="triton" if rank == 1 else None)
    p = usual._replace(weights=usual.weights * torch.nan) if rank == 1 else usual
    with pytest.raises(torch.linalg.LinAlgError, match=r"refused on rank 1, LinAlgError: .* in memories \[0, 1, 2\]"):
        SHARDED["update"](p)
    p = problem(B, T, Q, K, C + 1) if rank == 1 else usual
    with pytest.raises(ValueError, match=r"C must be .* on rank 1"):
        distributed.update_pooled(p.state, p.weights, p.values, p.noise_var)
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        distributed.update_pooled(MemoryState(state.mean, -state.cov), usual.weights, values, noise_var)


def nothing_is_written_or_read_as_on_one_process(rank, size, folder):
    """No memory, no pattern, no row. A rank that alone has no pattern is an error on every rank."""
    B, T, Q, K, C = SHAPES[0]
    for sizes in ((0, T, Q, K, C), (B, 0, Q, K, C), (B, T, Q, 0, C)):
        p = problem(*sizes)
        for name, run in SHARDED.items():
            truth = own_columns(oracle.flat(WHOLE[name](p, "reference")), rank, size, C)
            for field, x in oracle.flat(run(shard(p, rank, size))).items():
                oracle.assert_close(x, truth[field], f"{name} {sizes} {field}")
        found = distributed.update_pooled(p.state, p.weights, p.values, 1.0)
        repeated = MemoryState(*p.state), p.weights.repeat(1, size, 1), p.values.repeat(1, size, 1), 1.0
        truth = fastkm.update_posterior(*repeated, backend="reference").state
        for x, y in zip(found, truth, strict=True):
            oracle.assert_close(x, y, f"pooled {sizes}")
    p = shard(problem(B, 0 if rank == 1 else T, Q, K, C), rank, size)
    for name in ("write", "update", "filter"):
        with pytest.raises(ValueError, match=r"T must be .*, got 4 on ranks \[0, 2\], 0 on rank 1"):
            SHARDED[name](p)


def one_hot_weights_on_different_rows_are_noticed(rank, size, folder):
    p = shard(problem(2, 3, 3, 5, 20), rank, size)
    alike, own = (torch.eye(5, dtype=torch.float64)[rows].expand(2, 3, 5) for rows in ([0, 1, 2], [rank] * 3))
    with pytest.raises(ValueError, match="weights must be the same on every rank"):
        distributed.update_sharded(p.state, own, p.values, p.noise_var)
    with pytest.raises(ValueError, match="queries must be the same on every rank"):
        distributed.filter_sharded(p.state, alike, p.values, own, p.noise_var)


def a_factor_is_checked_on_every_rank(rank, size, folder):
    p = shard(problem(*SHAPES[0]), rank, size)
    good = distributed.factor_sharded(p.state.mean, p.ridge)
    cases = {
        r"ValueError: factor.pseudoinverse must have shape \[B, C, K\]": good._replace(pseudoinverse=good.mean),
        "TypeError: factor.pseudoinverse must be float64": good._replace(pseudoinverse=good.pseudoinverse.float()),
        "TypeError: factor.lower must be float64 like factor.mean": good._replace(
            lower=good.lower.float(), ridge=good.ridge.float()
        ),
        r"ValueError: factor.lower must have shape \[B, K, K\]": good._replace(lower=good.lower[:, 1:]),
        "TypeError: factor.ridge must be a tensor": good._replace(ridge=0.5),
        r"ValueError: factor.ridge must have shape \[B\]": good._replace(ridge=good.ridge[1:]),
    }
    for message, wrong in cases.items():
        with pytest.raises((TypeError, ValueError), match=f"refused on rank 1, {message}"):
            distributed.read_factored_sharded(wrong if rank == 1 else good, p.queries)
    with pytest.raises(ValueError, match=r"factor.ridge must be the same .* on rank 1"):
        distributed.read_factored_sharded(good._replace(ridge=good.ridge * (1 + (rank == 1))), p.queries)


def what_pytorch_raises_on_one_rank_is_raised_on_every_rank(rank, size, folder):
    """A device that only one rank asks for, and that is nowhere."""
    p = shard(problem(*SHAPES[0]), rank, size)
    distributed.save_sharded(p.state, f"{folder}/placed")
    with pytest.raises((RuntimeError, AssertionError), match="load_sharded: refused on rank 1, "):
        distributed.load_sharded(f"{folder}/placed", device="cuda:99" if rank == 1 else "cpu")
    for error in (RuntimeError, torch.OutOfMemoryError, NotImplementedError, MemoryError, AssertionError, EOFError):

        def share(error=error):
            if rank == 1:
                raise error("no room")
            return Share({"B": 1}, torch.float32, 1, None)

        kind = RuntimeError if issubclass(error, RuntimeError) else error
        with pytest.raises(kind, match=f"read_sharded: refused on rank 1, {kind.__name__}: no room"):
            Ranks("read_sharded", None).attempt(share)


def an_asymmetric_covariance_is_not_pooled(rank, size, folder):
    p = problem(*SHAPES[0])
    p.state.cov[1, 0, 1] += 0.3
    with pytest.raises(torch.linalg.LinAlgError, match=r"state.cov is not symmetric in memory \[1\]"):
        distributed.update_pooled(p.state, p.weights, p.values, p.noise_var)


def a_message_has_the_size_that_the_page_says(rank, size, folder):
    B, T, Q, K, C = SHAPES[0]
    p = shard(problem(B, T, Q, K, C), rank, size)
    numbers = {"write": B * (K + T) ** 2, "read": B * (K * K + K * Q), "update": B * (T + 1), "filter": B}
    for name, count in numbers.items():
        assert sent(lambda name=name: SHARDED[name](p)) == {"all_gather": [LENGTH], "all_reduce": [count]}, name
    both = sent(lambda: SHARDED["read, factored"](p))
    assert both == {"all_gather": [LENGTH] * 2, "all_reduce": [B * K * K, B * K * Q]}
    p = problem(B, T, Q, K, C)
    pooled = sent(lambda: distributed.update_pooled(p.state, p.weights, p.values, 1.0))
    assert pooled == {"all_gather": [LENGTH], "all_reduce": [B * (K * K + K * C)]}


def sent(call):
    """How many numbers each collective of a call sent, as the profiler of PyTorch saw them."""
    with torch.profiler.profile(record_shapes=True) as profile:
        call()
    found = {}
    for event in profile.events():
        name = event.name.removeprefix("gloo:")
        if name in ("all_gather", "all_reduce") and name != event.name:
            found.setdefault(name, []).append(max(torch.Size(shape).numel() for shape in event.input_shapes if shape))
    return found


def the_example_is_a_write_and_a_read(rank, size, folder):
    """The same as one process, up to the rounding of the sums."""
    path = Path(__file__).parents[1] / "examples" / "sharded_memory.py"
    if not path.exists():
        return
    example = runpy.run_path(str(path))
    found = example["main"](12, 40, 5, f"{folder}/example")

    def columns(rows, seed):
        return torch.stack([example["column"](rows, seed * 40 + place) for place in range(40)], 1).unsqueeze(0)

    mean = example["SCALE"] * columns(12, 0)
    written = fastkm.write(MemoryState(mean, torch.eye(12).unsqueeze(0)), columns(5, 1), 1.0, 1.0)
    recalled = fastkm.read(written.state.mean, columns(5, 1) + 0.5 * columns(5, 2), 1.0).values
    assert abs(found["nats"] / written.kl.sum().item() - 1) < 1e-5
    assert abs(found["error of recall"] / (recalled - columns(5, 1)).square().mean().sqrt().item() - 1) < 1e-5
    assert os.path.exists(f"{folder}/example/.metadata")


def a_state_is_saved_by_three(rank, size, folder):
    for name, p in problems_on_disk().items():
        distributed.save_sharded(shard(p, rank, size).state, os.fsencode(f"{folder}/{name}"))
    with pytest.raises(ValueError, match="K must be the same"):
        distributed.save_sharded(problem(1, 1, 1, 3 + (rank == 1), 5).state, f"{folder}/never")
    with pytest.raises(TypeError, match="save_sharded: refused on rank 1, TypeError: "):
        distributed.save_sharded(p.state, None if rank == 1 else f"{folder}/never")
    assert not os.path.exists(f"{folder}/never")


def problems_on_disk():
    few = problem(*SHAPES[1])
    return {"few": few, "narrow": oracle.map_tensors(problem(*SHAPES[2]), torch.Tensor.float)}


# ---- two ranks -------------------------------------------------------------------------------------------------------


def two_load_what_three_have_saved(rank, size, folder):
    for name, p in problems_on_disk().items():
        C = p.state.mean.shape[2]
        width = -(-C // 2)
        state = distributed.load_sharded(os.fsencode(f"{folder}/{name}"))
        assert torch.equal(state.mean, p.state.mean[..., rank * width : (rank + 1) * width])
        assert torch.equal(state.cov, p.state.cov)
        state = distributed.load_sharded(f"{folder}/{name}", [1, C - 1][rank])
        assert torch.equal(state.mean, p.state.mean[..., [slice(0, 1), slice(1, C)][rank]])
        with pytest.raises(ValueError, match=rf"columns of all ranks must add up to {C}, got \[1, 2\]"):
            distributed.load_sharded(f"{folder}/{name}", 1 + rank)
        with pytest.raises(OSError, match=r"refused on ranks \[0, 1\], OSError: .*nowhere"):
            distributed.load_sharded(f"{folder}/nowhere")
        mean = distribute_tensor(torch.empty_like(p.state.mean), init_device_mesh("cpu", (size,)), [Shard(1)])
        dcp.load({"mean": mean}, checkpoint_id=f"{folder}/{name}")  # as any other program may
        assert torch.equal(mean.full_tensor(), p.state.mean)


class Loss(nn.Module):
    """A loss of the memory alone."""

    def __init__(self):
        super().__init__()
        self.memory = KanervaMemory(6, 4, learn_obs_noise=True)

    def forward(self, z):
        read, written = self.memory(z)
        return (read.values - z).square().mean() + self.memory.kl(written.state).mean()


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 9)

    def forward(self, codes):
        return Independent(Normal(self.linear(codes), 1.0), 1)


class Machine(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = DynamicKanervaMachine(nn.Linear(9, 6), Decoder(), KanervaMemory(6, 4, learn_obs_noise=True))

    def forward(self, x):
        return self.model(x).total


def same_noise(x, **_):
    """Stands for torch.randn_like where one process and two must sample alike."""
    return (10 * x.detach()).cos()


def trained(make, wrap, x):
    torch.manual_seed(0)
    module = make().double()
    wrapped = wrap(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(x).backward()
        optimizer.step()
    return [y.full_tensor() if isinstance(y, DTensor) else y.detach() for y in module.parameters()]


def two_steps_of_training_are_those_of_one_process(rank, size, folder):
    """With DistributedDataParallel and fully_shard around modules that know nothing of them."""
    torch.randn_like, original = same_noise, torch.randn_like
    try:
        for make, width in ((Loss, 6), (Machine, 9)):
            torch.manual_seed(1)
            x = torch.randn(4, 5, width, dtype=torch.float64)
            expected = trained(make, lambda module: module, x)
            mesh = init_device_mesh("cpu", (size,))
            for wrap in (DistributedDataParallel, lambda module, mesh=mesh: fully_shard(module, mesh=mesh)):
                for got, truth in zip(trained(make, wrap, x[2 * rank : 2 * rank + 2]), expected, strict=True):
                    oracle.assert_close(got, truth, make.__name__)
    finally:
        torch.randn_like = original


CHECKS = {
    3: [
        shards_equal_one_process_in_float64,
        shards_are_as_exact_as_the_literal_loop_in_float32,
        what_is_ill_conditioned_keeps_its_digits,
        what_every_rank_has_is_the_same_bit_by_bit,
        gradients_equal_those_of_one_process,
        pooled_patterns_are_those_of_one_process,
        memories_of_all_ranks_merge_as_on_one_process,
        gradients_go_through_a_merge,
        ranks_that_disagree_do_not_merge,
        a_mesh_and_a_part_of_the_ranks_are_groups,
        what_ranks_disagree_about_is_named_on_every_rank,
        nothing_is_written_or_read_as_on_one_process,
        one_hot_weights_on_different_rows_are_noticed,
        a_factor_is_checked_on_every_rank,
        what_pytorch_raises_on_one_rank_is_raised_on_every_rank,
        an_asymmetric_covariance_is_not_pooled,
        a_message_has_the_size_that_the_page_says,
        the_example_is_a_write_and_a_read,
        a_state_is_saved_by_three,
    ],
    2: [
        two_load_what_three_have_saved,
        two_steps_of_training_are_those_of_one_process,
        memories_of_all_ranks_merge_as_on_one_process,
        gradients_go_through_a_merge,
        ranks_that_disagree_do_not_merge,
    ],
}


@pytest.mark.parametrize("name", [check.__name__ for checks in CHECKS.values() for check in checks])
def test_on_processes(name, failures):
    assert name not in failures, "\n".join(failures[name])


def die(rank, folder, name, when):
    """The last rank is gone before it takes part, or after the header, when the others wait for its sum."""
    start(rank, 3, f"{folder}/meet")
    p = shard(problem(*SHAPES[0]), rank, 3)
    dist.barrier()
    if rank == 2 and when == "at once":
        os._exit(0)
    if rank == 2:
        Ranks.sum = lambda *_: os._exit(0)
    before = time.monotonic()
    try:
        SHARDED[name](p) if name in SHARDED else distributed.merge_memories([], p.state)
    except RuntimeError as error:
        torch.save((time.monotonic() - before, str(error)), f"{folder}/told{rank}")
    os._exit(0)  # without the goodbyes of a group that is broken


@pytest.mark.parametrize(
    ("name", "when"),
    [("write", "at once"), ("write", "before the sum"), ("read", "before the sum"), ("merge", "at once")],
)
def test_a_rank_that_dies_is_an_error_on_every_other(tmp_path, name, when):
    mp.spawn(die, (str(tmp_path), name, when), nprocs=3)
    for rank in range(2):
        seconds, told = torch.load(tmp_path / f"told{rank}")
        assert seconds < TIMEOUT.total_seconds() + 5
        assert told


# ---- one process -----------------------------------------------------------------------------------------------------


def test_without_a_group_the_error_says_so():
    p = problem(*SHAPES[0])
    with pytest.raises(RuntimeError, match="no process group exists"):
        SHARDED["read"](p)


@pytest.mark.parametrize("columns", [3, 9, 20])
def test_the_gradient_through_a_square_root(columns):
    """Of what depends on F Fᵀ alone, with and without full rank."""
    torch.manual_seed(0)
    mean, values = (torch.randn(2, rows, columns, dtype=torch.float64).requires_grad_() for rows in (4, 5))
    probe = torch.randn(2, 9, 9, dtype=torch.float64)
    gram = Gram.apply(mean, values)
    rows = torch.cat((mean, values), 1)
    oracle.assert_close(gram, rows @ rows.mT)
    root, _ = SquareRoot.apply(gram, min(9, columns), None)
    oracle.assert_close(root @ root.mT, gram)
    found = torch.autograd.grad(((root @ root.mT) * probe).sum(), (mean, values))
    expected = torch.autograd.grad(((rows @ rows.mT) * probe).sum(), (mean, values))
    for x, y in zip(found, expected, strict=True):
        oracle.assert_close(x, y)


def test_a_checksum_tells_values_and_places_apart():
    x = torch.arange(6.0).view(1, 2, 3)
    others = [x.flip(2), x.flip(1), x.double(), x + 1, x[..., :2], None, torch.zeros(1, 2, 3), x[0].flip(0)]
    assert all(int(checksum(x)) != int(checksum(y)) for y in others)
    assert int(checksum(x)) == int(checksum(x.clone().mT.contiguous().mT))
    assert int(checksum(torch.tensor(1.0).expand(2, 3))) == int(checksum(torch.ones(2, 3)))
    assert int(checksum(torch.tensor([True, False]))) != int(checksum(torch.tensor([False, True])))
    one = torch.ones(1, dtype=torch.float64)
    assert int(checksum(one.as_strided((1,), (7,)))) == int(checksum(one))
    assert int(checksum(torch.empty(2, 0, 3))) == 1


def one_hot(rows):
    return torch.nn.functional.one_hot(torch.tensor(rows), BLOCK // 2).float()


@pytest.mark.parametrize("rows", [[0, 1], [0, 0, 0, 0, 1], [0, 1, 1, 0], [0, 1, 2, 3]])
def test_a_checksum_tells_one_hot_rows_apart(rows):
    """Also where the sums of places are the same, and across the blocks that a checksum multiplies at once."""
    x = one_hot(rows)
    for other in set(itertools.permutations(rows)):
        assert (int(checksum(one_hot(other))) == int(checksum(x))) == (other == tuple(rows))


@pytest.mark.parametrize("uneven", [False, True])
def test_the_shards_of_the_benchmark_are_all_columns(uneven):
    sharding = pytest.importorskip("benchmarks.sharding", reason="needs the source tree")
    for size in (1, 2, 3, 4):
        parts = [sharding.own_columns(101, rank, size, uneven) for rank in range(size)]
        assert [place for part in parts for place in range(101)[part]] == list(range(101))
    sizes = sharding.Sizes(K=4, C=101, T=3, Q=5)
    assert sharding.bytes_sent("write", sizes, 2) == 8 * LENGTH + 4 * 7**2
    assert sharding.bytes_sent("read", sizes, 4) == 3 * 8 * LENGTH + 1.5 * 4 * (4**2 + 4 * 5)
