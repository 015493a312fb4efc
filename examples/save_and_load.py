"""How do I stop in the middle of a stream and go on later?

The state of a memory is two tensors. Save them, load them in another process, and go on writing: the result equals that
of a stream that was never interrupted. A file from safetensors holds no code, so it is safe to load.
"""

import argparse
import tempfile
from pathlib import Path

import torch

import fastkm

K, C, T, STOP = 16, 40, 48, 32


def main(picture: str | None = None) -> float:
    torch.manual_seed(0)
    patterns = torch.randn(1, T, 8) @ torch.randn(8, C)  # a stream whose patterns have eight causes
    prior = fastkm.MemoryState(torch.randn(1, K, C), torch.eye(K).unsqueeze(0))
    uninterrupted = fastkm.write(prior, patterns, noise_var=1.0, ridge=1.0)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.safetensors"
        first = fastkm.write(prior, patterns[:, :STOP], noise_var=1.0, ridge=1.0)
        fastkm.save_memory_state(first.state, path)
        size = path.stat().st_size
        resumed = fastkm.write(fastkm.load_memory_state(path), patterns[:, STOP:], noise_var=1.0, ridge=1.0)

    gap = (resumed.state.mean - uninterrupted.state.mean).abs().max().item()
    print(f"{size:,} bytes on disk; stopped and uninterrupted streams differ by {gap:.1e}")
    if picture:
        draw(picture, uninterrupted.kl[0])
    return gap


def draw(picture: str, kl: torch.Tensor) -> None:  # [T]
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    axis.bar(range(1, T + 1), kl.numpy())
    axis.axvline(STOP + 0.5, color="gray", linestyle="--", label="saved and loaded here")
    axis.set(xlabel="pattern", ylabel="nats", title="What each pattern teaches the memory")
    axis.legend()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", help="where to draw the information in each pattern")
    main(**vars(parser.parse_args()))
