"""Run the experiment and write docs/results/editing.md with its picture: ``python -m examples.editing``."""

import argparse
from pathlib import Path

import torch

from examples.editing import experiment, transformer
from examples.editing.experiment import Found, Row
from fastkm.cli.console import markdown_table

DOCS = Path(__file__).parents[2] / "docs"
HEADERS = ("facts edited", "new answer", "in other phrases", "the first 100", "others: old answer", "others: drift")

PAGE = """# Editing a layer

Written by `{command}`: one matrix of a small transformer is edited by `update_posterior`, in
place. RLSEdit, MEMIT and analytic continual learning are this update; `examples/editing/editing.py` has their equations
beside it.

The model has {blocks} blocks of width {width} and was trained here, on a table of {facts:,} facts that are drawn at
random: a subject of two tokens, a relation and one of {objects} objects, asked for in {phrases} phrases. It answers
{trained} of them. The second matrix of the last MLP, K = {K:,} by C = {width}, is the memory's mean. Each edit gives a
fact another object: the key is the matrix's input at the last token, the mean over {same} phrases, and the value is
found by gradient descent through the model. The prior holds what the layer did on all facts:
$U^{{-1}} = {identity:g} I + {anchor:g} \\cdot K_0^\\top K_0$, $\\sigma^2 = 1$. Edits come in batches of {batch}.

{exact}

*New answer*: share of the edited facts that are answered with the new object. *Others*: the {kept:,} facts that were
never edited; *drift* is the change of the layer's outputs for them, root mean square, as a share of the outputs.

The same with one covariance, that of the beginning, for every batch, which is MEMIT's step repeated:

{frozen}

This answers as well on this table. But the layer is then not the solution for the edits that it holds, as the picture
shows, and edits cannot be taken out of it exactly.

```{{image}} ../images/editing.png
:alt: drift of the layer's outputs for facts that were not edited, and the distance from the formula in float64
:width: 90%
```

## Edits removed again

The first half of the edits was taken out by `remove_patterns`, batch by batch. {restored} of these facts had the answer
of the table again. Of the edits that stayed {stayed} had the new answer in other phrases, and of the facts never edited
{still} the old one.

## Against the formula in float64

$W = (C_0^{{-1}} + \\sum K_t^\\top K_t)^{{-1}} (C_0^{{-1}} W_0 + \\sum K_t^\\top V_t)$ with the edits that are in
the layer, so $W_0$ when all are removed. The memory is float32, and the condition number of $C_0$ is {condition:.1e}.

{gaps}

## CPU time of a batch

The smallest of three, {threads}. The formula is one Cholesky factor and
solve, which an editor without the recursion makes for every batch. At this condition number the CPU kernel of an update
computes in float64.

{seconds}
"""


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def rows(found: list[Row]) -> str:
    return markdown_table(
        HEADERS, [(f"{row.edited:,}", *(percent(x) for x in row[1:-1]), f"{100 * row.drift:.2f} %") for row in found]
    )


def page(found: Found, command: str, K: int, facts: int, edits: int) -> str:
    threads = torch.get_num_threads()
    gaps = [(when, f"{gap:.1e}") for when, gap in found.gaps.items()]
    seconds = [(name, f"{1000 * x:.0f} ms") for name, x in found.seconds.items()]
    return PAGE.format(
        command=command,
        blocks=transformer.BLOCKS,
        width=transformer.WIDTH,
        facts=facts,
        objects=transformer.OBJECTS,
        phrases=transformer.PHRASES,
        trained=percent(found.trained),
        K=K,
        same=transformer.EDITED_WITH,
        identity=experiment.IDENTITY,
        anchor=experiment.ANCHOR / transformer.EDITED_WITH,
        batch=experiment.BATCH,
        exact=rows(found.exact),
        kept=facts - edits,
        frozen=rows(found.frozen),
        restored=percent(found.restored),
        stayed=percent(found.half.other),
        still=percent(found.half.kept),
        condition=found.condition,
        gaps=markdown_table(("layer", "largest difference / largest entry"), gaps),
        threads=f"{threads} thread{'s' if threads > 1 else ''}",
        seconds=markdown_table(("a batch by", "CPU time"), seconds),
    )


def draw_picture(found: Found, path: Path) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, told in (("update_posterior", found.exact), ("one covariance for all batches", found.frozen)):
        left.plot([row.edited for row in told], [100 * row.drift for row in told], "o-", label=name)
    left.set(xlabel="facts edited", ylabel="drift of other facts (%)", ylim=(0, None))
    left.legend()
    right.barh(list(found.gaps), list(found.gaps.values()))
    right.set(xscale="log", xlabel="distance from the formula in float64")
    right.invert_yaxis()
    figure.savefig(path, dpi=110)


def write(command: str, folder: Path, K: int, facts: int, edits: int, steps: int) -> str:
    """Run everything, write the page and its picture under ``folder``, and return the page."""
    found = experiment.main(K, facts, edits, steps)
    text = page(found, command, K, facts, edits)
    (folder / "results").mkdir(parents=True, exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    (folder / "results" / "editing.md").write_text(text, encoding="utf-8")
    draw_picture(found, folder / "images" / "editing.png")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.editing", description=__doc__)
    parser.add_argument("--rows", type=int, default=2_048, help="K, rows of the edited matrix (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shown = parser.prog + ("" if options.rows == 2_048 else f" --rows {options.rows}")
    print(write(shown, DOCS, options.rows, facts=4_000, edits=2_000, steps=300))
