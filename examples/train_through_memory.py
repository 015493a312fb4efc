"""How do I train a network through the memory?

Gradients flow through every write and read. Here they train an encoder and the memory's prior so that noisy cues recall
clean patterns. Each step writes a new episode; nothing is kept between episodes but the parameters.
"""

import argparse

import torch
from torch import nn

import fastkm

K, C, T, B, PIXELS, STEPS = 8, 16, 12, 16, 64, 60


def main(picture: str | None = None) -> list[float]:
    torch.manual_seed(0)
    basis = torch.randn(6, PIXELS)  # all patterns lie near a space of six dimensions
    encoder, decoder = nn.Linear(PIXELS, C), nn.Linear(C, PIXELS)
    memory = fastkm.KanervaMemory(code_size=C, memory_size=K, obs_noise_stddev=0.5)
    parameters = [*encoder.parameters(), *decoder.parameters(), *memory.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)

    losses = []
    for _ in range(STEPS):
        patterns = torch.randn(B, T, 6) @ basis / 6**0.5
        cues = patterns + 0.5 * torch.randn_like(patterns)
        state = memory.write(encoder(patterns)).state
        values, weights = memory.read(encoder(cues), state)
        error = (decoder(values) - patterns).square().mean()
        price = memory.kl(state).mean() / T + memory.kl_weights(weights).mean()  # nats a pattern
        optimizer.zero_grad()
        (error + 1e-3 * price).backward()
        optimizer.step()
        losses.append(error.item())
    print(f"mean squared error of what is recalled: {losses[0]:.3f} at first, {losses[-1]:.3f} after {STEPS} steps")
    if picture:
        draw(picture, losses)
    return losses


def draw(picture: str, losses: list[float]) -> None:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    axis.semilogy(losses)
    axis.set(xlabel="step", ylabel="squared error of recall")
    axis.axhline(0.25, color="gray", linestyle="--")
    axis.text(0, 0.26, "error of the cues", color="gray", va="bottom")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", help="where to draw the error of every step")
    main(**vars(parser.parse_args()))
