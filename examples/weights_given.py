"""How do I do Bayesian linear regression, or recursive least squares, with this?

`update_posterior` takes the weights as given. Read them as the features of data points and the memory as the unknown
coefficients: then it is Bayesian linear regression. Points may come one at a time or all at once; the answer is the
same.
"""

import argparse

import torch

import fastkm

ROWS, NOISE = 12, 0.2  # features, and the standard deviation of the noise


def features(x: torch.Tensor) -> torch.Tensor:  # [...] -> [..., ROWS]
    return torch.exp(-0.5 * ((x.unsqueeze(-1) - torch.linspace(-3, 3, ROWS)) / 0.6) ** 2)


def main(picture: str | None = None) -> dict[str, float]:
    torch.manual_seed(0)
    x = torch.cat([-3 + 2.5 * torch.rand(20), 1 + torch.rand(10)])  # two clusters with a gap between them
    y = torch.sin(2 * x) + NOISE * torch.randn_like(x)
    prior = fastkm.MemoryState(torch.zeros(1, ROWS, 1), torch.eye(ROWS).unsqueeze(0))

    weights, values = features(x).unsqueeze(0), y.view(1, -1, 1)  # [1, T, K], [1, T, 1]
    at_once = fastkm.update_posterior(prior, weights, values, NOISE**2)
    streamed = prior  # recursive least squares
    for t in range(len(x)):
        streamed = fastkm.update_posterior(streamed, weights[:, t : t + 1], values[:, t : t + 1], NOISE**2).state

    gap = (streamed.mean - at_once.state.mean).abs().max().item()
    grid = torch.linspace(-3, 3, 200)
    guess = (features(grid) @ at_once.state.mean[0]).squeeze(-1)
    spread = ((features(grid) @ at_once.state.cov[0]) * features(grid)).sum(-1).sqrt()  # √(wᵀ U w)
    print(f"log evidence {at_once.log_evidence.item():.2f}; streamed and at once differ by {gap:.1e}")
    print(f"standard deviation where there are data {spread[30]:.2f}, in the gap {spread[115]:.2f}")
    if picture:
        draw(picture, x, y, grid, guess, spread)
    return {"gap": gap, "with data": spread[30].item(), "without": spread[115].item()}


def draw(picture: str, x, y, grid, guess, spread) -> None:
    from matplotlib import pyplot

    x, y, grid, guess, spread = (values.numpy() for values in (x, y, grid, guess, spread))
    figure, axis = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    axis.plot(x, y, "k.", label="data")
    axis.plot(grid, guess, label="mean")
    axis.fill_between(grid, guess - 2 * spread, guess + 2 * spread, alpha=0.25, label="two standard deviations")
    axis.legend()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", help="where to draw the fit")
    main(**vars(parser.parse_args()))
