"""How do I write a memory that is too large for one process?

Every process holds some columns of the memory and of the patterns. Start it with torchrun, on as many processes as you
like; all numbers but the seconds are the same:

    torchrun --nproc-per-node 2 examples/sharded_memory.py
"""

import argparse
import time

import torch
import torch.distributed as dist

from fastkm import MemoryState
from fastkm.distributed import read_sharded, save_sharded, write_sharded

NOISE_VAR, RIDGE = 1.0, 1.0
SCALE = 0.01  # of the mean before anything is written


def column(rows: int, place: int) -> torch.Tensor:
    """A column of random numbers that depends on its place alone, not on how many processes there are."""
    return torch.randn(rows, generator=torch.Generator().manual_seed(place))


def make_columns(rows: int, columns: int, seed: int) -> torch.Tensor:
    """The columns ``[1, rows, about columns / ranks]`` of this process."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = range(columns * rank // ranks, columns * (rank + 1) // ranks)
    return torch.stack([column(rows, seed * columns + place) for place in mine], 1).unsqueeze(0)


def main(rows: int, columns: int, patterns: int, folder: str | None = None) -> dict[str, float]:
    prior = MemoryState(SCALE * make_columns(rows, columns, seed=0), torch.eye(rows).unsqueeze(0))
    values = make_columns(patterns, columns, seed=1)
    dist.barrier()

    start = time.perf_counter()
    written = write_sharded(prior, values, NOISE_VAR, RIDGE)
    middle = time.perf_counter()
    cues = values + 0.5 * make_columns(patterns, columns, seed=2)
    recalled = read_sharded(written.state.mean, cues, RIDGE).values
    end = time.perf_counter()

    squares = torch.stack([(x - values).square().sum() for x in (cues, recalled)])
    dist.all_reduce(squares)  # what a rank has of its own columns is summed like any other tensor
    found = {
        "nats": written.kl.sum().item(),
        "error of a cue": (squares[0] / values.shape[1] / columns).sqrt().item(),
        "error of recall": (squares[1] / values.shape[1] / columns).sqrt().item(),
    }
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes, K = {rows}, C = {columns}, {patterns} patterns")
        print(f"  a write: {middle - start:.1f} s, a read: {end - middle:.1f} s")
        print("  " + ", ".join(f"{name} {value:.5g}" for name, value in found.items()))
    if folder:
        save_sharded(written.state, folder)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=16384)
    parser.add_argument("--patterns", type=int, default=64)
    parser.add_argument("--folder", help="where to save the memory, for load_sharded on any number of processes")
    dist.init_process_group("gloo")
    main(**vars(parser.parse_args()))
    dist.destroy_process_group()
