"""Run the experiments and write docs/results/sequences.md with its pictures: ``python -m examples.sequences``.

``capacity`` and ``language`` are trainings. They save every run beside the page, go on where they were stopped, and
write their own section of the page at the end.
"""

import argparse
from pathlib import Path

import torch

from examples.sequences import capacity, language, recall, regression, rewriting
from examples.sequences.saved import load
from fastkm.cli.console import markdown_table

TRAININGS = {"capacity": capacity, "language": language}
DOCS = Path(__file__).parents[2] / "docs"

PAGE = """# Sequences

Written by `python -m examples.sequences --sequences {sequences} --seeds {seeds}`: what the filter does on tasks that
others defined for sequence layers. Figures are means ± standard deviations over {seeds} seeds; where layers
are trained, over the seeds that are named there.

## In-context linear regression, untrained

Garg et al., 2022, with noise: $y = w^\\top x + \\varepsilon$, $d = {D}$, $\\sigma^2 = {noise}$. Keys and queries are
$x$, values are $y$, and nothing is learned. The squared error / $d$ of the forecast of $y_t$ before it is seen, for
{sequences} sequences a seed. The scalars of the other layers are the best of a grid on other sequences.

{regression}

The exact layer's forecast differs from the Bayes-optimal one, solved in float64 at every step, by at most {gap:.1e}.
Its intervals hold what they say:

{coverage}

```{{image}} ../images/sequences_regression.png
:alt: squared error of every layer, and coverage of the intervals, by the number of examples seen
:width: 90%
```

## Continuous multi-query recall, untrained

The stacked task of Zoology, 2026: {vocabulary:,} fixed keys and values of length 1, K = {K}, identity projections.
Percent of the pairs that come back, for {few} sequences a seed. Mesa solves the same ridge regression
($\\sigma^2 = {ridge}$) by 30 steps of conjugate gradients. The delta rule has the best $\\beta$ of a grid for each
column.

{plain}

The same with keys that share a direction, so that two of them have an inner product of 0.8. This half is not of
Zoology.

{hard}

```{{image}} ../images/sequences_recall.png
:alt: share recalled by every layer, by pairs per row of the memory
:width: 90%
```

## Keys that get a second value, untrained

The forgetting task of Zoology with the same embeddings: after all pairs, the first half of the keys is written again
with other values, and the last value counts. Percent recalled of rewritten / untouched keys. Every layer has the
scalars ($\\sigma^2$ and its decay, or $\\beta$ and its gate) that are best on other sequences, for each column.

{rewriting}

<!-- capacity -->
{capacity}<!-- /capacity -->

<!-- language -->
{language}<!-- /language -->
"""


def write(sequences: int, seeds: int, folder: Path) -> str:
    """Run what is not trained, write the page and its pictures under ``folder``, and return the page."""
    forecast, few = regression.main(sequences, seeds), max(1, sequences // 50)
    plain, hard = (recall.main(few, seeds, shared) for shared in (0.0, recall.SHARED))
    twice = rewriting.main(few, seeds)
    trained = {name: load(folder / "results" / training.FILE) for name, training in TRAININGS.items()}
    covered = forecast.covered.mean(2)  # [seeds, levels]
    pairs = ("layer", *(f"{n} pairs, {n / recall.K:g} K" for n in recall.PAIRS))
    page = PAGE.format(
        sequences=sequences,
        seeds=seeds,
        D=regression.D,
        noise=regression.NOISE_VAR,
        regression=markdown_table(("layer", *(f"t = {t}" for t in regression.SHOWN)), regression.rows(forecast)),
        gap=forecast.gap,
        coverage=markdown_table(
            ("interval", "y is inside", "at the worst step"),
            [
                (
                    f"{level:.0%}",
                    f"{100 * covered[:, i].mean():.1f} ± {100 * covered[:, i].std():.1f} %",
                    f"{100 * forecast.covered[:, i].mean(0).min():.1f} %",
                )
                for i, level in enumerate(regression.LEVELS)
            ],
        ),
        vocabulary=recall.VOCABULARY,
        K=recall.K,
        few=few,
        ridge=recall.NOISE_VAR,
        plain=markdown_table(pairs, recall.rows(plain)),
        hard=markdown_table(pairs, recall.rows(hard)),
        rewriting=markdown_table(("layer", *(f"{n} pairs" for n in rewriting.PAIRS)), rewriting.rows(twice)),
        **{name: training.section(trained[name]) for name, training in TRAININGS.items()},
    )
    (folder / "results").mkdir(parents=True, exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    (folder / "results" / "sequences.md").write_text(page, encoding="utf-8")
    regression.draw_picture(forecast, str(folder / "images" / "sequences_regression.png"))
    recall.draw_picture(plain, hard, str(folder / "images" / "sequences_recall.png"))
    for name, training in TRAININGS.items():
        training.draw_picture(trained[name], str(folder / "images" / f"sequences_{name}.png"))
    return page


def write_section(name: str, folder: Path) -> str:
    """Write what is saved of one training into its section of the page and its picture, and return the section."""
    training, page = TRAININGS[name], folder / "results" / "sequences.md"
    records = load(folder / "results" / training.FILE)
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    section, after = training.section(records), rest.partition(end)[2]
    page.write_text(before + begin + section + end + after, encoding="utf-8")
    training.draw_picture(records, str(folder / "images" / f"sequences_{name}.png"))
    return section


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.sequences", description=__doc__)
    parser.add_argument("experiment", nargs="?", default="page", choices=("page", *TRAININGS))
    parser.add_argument("--sequences", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--saved", action="store_true", help="of a training: write what is saved, train nothing")
    parser.add_argument("--threads", type=int, help="1 for trainings, else 2")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or (1 if options.experiment in TRAININGS else 2))
    if options.experiment in TRAININGS:
        if not options.saved:
            TRAININGS[options.experiment].main(DOCS)
        print(write_section(options.experiment, DOCS))
    else:
        print(write(options.sequences, options.seeds, DOCS))
