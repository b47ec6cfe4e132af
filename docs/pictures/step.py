"""Draws step.svg, one step of the paper's algorithm on two ranks: ``python -m docs.pictures.step``.

All numbers are of the package: its sketches, its exchange.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hvd_sketch import CountSketch, SketchConfig, SketchedAllreduce, Transport
from hvd_sketch.transport import run_local

TARGET = Path(__file__).with_suffix(".svg")
DIM, RANKS = 32, 2
CONFIG = SketchConfig.paper(rows=3, cols=24, k=3, oversample=2, momentum=0.0, seed=3)
SHARED = {4: 2.4, 11: -3.2, 19: 1.8, 26: 2.9}  # in the gradients of both ranks
CANCELLED = 15  # large on each rank, and not in the sum
WIDTH, HALF, GUTTER, BAR_HEIGHT, CELL_HEIGHT = 830, 400, 30, 44, 13
OF_A_RANK, OF_A_SUM = BAR_HEIGHT / 2, BAR_HEIGHT / 3.6  # height of a bar of 1.0
STYLE = """
svg { font: 14px system-ui, sans-serif; --ink: #1f2328; --soft: #59636e; --paper: #ffffff; --line: #d1d9e0;
  --blue: #33679d; --orange: #d55e00; --plus: #33679d; --minus: #b5447a; }
@media (prefers-color-scheme: dark) { svg { --ink: #e6edf3; --soft: #9aa5b1; --paper: #161b22; --line: #3d444d;
  --blue: #79b0e6; --orange: #ff9d57; --plus: #79b0e6; --minus: #f08fbf; } }
text { fill: var(--ink); } .soft { fill: var(--soft); } .title { font-weight: 600; }
.card { fill: var(--paper); stroke: var(--line); } .axis { stroke: var(--line); } .bar { fill: var(--blue); }
.chosen { fill: var(--orange); } .candidate { fill: none; stroke: var(--orange); stroke-width: 2; }
.true { stroke: var(--ink); stroke-width: 2; } .plus { fill: var(--plus); } .minus { fill: var(--minus); }
.owner { stroke: var(--ink); stroke-dasharray: 3 3; }
"""


@dataclass
class Step:
    """One step: ``before`` and ``after`` are v of every rank, ``tables`` their sketches, all float32."""

    before: list[Tensor]
    tables: list[Tensor]
    summed: Tensor
    estimates: Tensor
    candidates: list[int]
    update: dict[int, float]
    after: list[Tensor]


def gradient(rank: int) -> Tensor:
    """A rank's gradient: float32 [DIM], noise and what SHARED and CANCELLED say."""
    values = torch.randn(DIM, generator=torch.Generator().manual_seed(rank)) * 0.35
    for place, value in SHARED.items():
        values[place] += value / RANKS
    values[CANCELLED] = 1.5 if rank else -1.5
    return values


def take_step() -> Step:
    """A step of the package, and what its ranks had in between."""
    before = [gradient(rank) for rank in range(RANKS)]
    sketches = [CountSketch(DIM, CONFIG.rows, CONFIG.cols, CONFIG.seed, shards=RANKS) for _ in range(RANKS)]
    tables = [sketch.accumulate_(v).table.clone() for sketch, v in zip(sketches, before, strict=True)]
    summed = sketches[0].merge_(sketches[1])

    def exchange(transport: Transport) -> tuple[dict[int, float], Tensor]:
        ours = SketchedAllreduce(CONFIG, DIM, transport)
        update = ours.step(before[transport.rank])
        assert update.indices is not None  # nothing is dense here
        return dict(zip(update.indices.tolist(), update.values.tolist(), strict=True)), ours.residual

    results = run_local(RANKS, exchange)
    candidates = summed.top(CONFIG.candidate_count(DIM)).tolist()
    assert set(results[0][0]) <= set(candidates)
    return Step(
        before, tables, summed.table, summed.estimate(), candidates, results[0][0], [after for _, after in results]
    )


def bars(
    values: Tensor, x: float, width: float, scale: float, marked: Sequence[int] = (), chosen: Sequence[int] = ()
) -> str:
    """A bar chart around a zero line at BAR_HEIGHT; ``marked`` bars are framed, ``chosen`` ones have another colour."""
    step, zero = width / DIM, BAR_HEIGHT
    parts = [f'<line class="axis" x1="{x:.1f}" y1="{zero}" x2="{x + width:.1f}" y2="{zero}"/>']
    for place, value in enumerate(values.tolist()):
        height = max(abs(value) * scale, 4 if place in chosen else 0.5)
        kind = "chosen" if place in chosen else "candidate" if place in marked else "bar"
        top = zero - height if value > 0 else zero
        left = x + place * step + 1
        parts.append(
            f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{step - 2:.1f}" height="{height:.1f}"/>'
        )
    return "".join(parts)


def strokes(values: Tensor, width: float) -> str:
    """A stroke at each value, over the bars of estimates."""
    step, lines = width / DIM, []
    for place, value in enumerate(values.tolist()):
        at, left = BAR_HEIGHT - value * OF_A_SUM, place * step
        lines.append(f'<line class="true" x1="{left:.1f}" y1="{at:.1f}" x2="{left + step:.1f}" y2="{at:.1f}"/>')
    return "".join(lines)


def cells(table: Tensor, x: float, width: float, owners: bool = False) -> str:
    """A table as cells whose opacity is the magnitude; ``owners`` divides the columns by the rank that owns them."""
    flat = table.flatten(1)
    step, parts = width / flat.shape[1], []
    for row, line in enumerate(flat.tolist()):
        for column, value in enumerate(line):
            parts.append(
                f'<rect class="{"plus" if value > 0 else "minus"}" fill-opacity="{min(abs(value) / 3, 1):.2f}" '
                f'x="{x + column * step:.1f}" y="{row * CELL_HEIGHT}" width="{step - 1:.1f}" '
                f'height="{CELL_HEIGHT - 1}"/>'
            )
    bottom = len(flat) * CELL_HEIGHT
    if owners:
        middle = x + width / 2
        parts.append(f'<line class="owner" x1="{middle}" y1="-6" x2="{middle}" y2="{bottom + 6}"/>')
    parts.append(f'<rect class="axis" fill="none" x="{x}" y="-1" width="{width}" height="{bottom + 1}"/>')
    return "".join(parts)


def text(words: str, x: float, y: float, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{words}</text>'


def panels(step: Step) -> Iterator[tuple[str, str, float, list[str]]]:
    """Title, explanation, height and content of every panel, from its own top left corner."""
    places = [0, HALF + GUTTER]
    k, candidates, chosen = CONFIG.k, step.candidates, list(step.update)
    two = 2 * BAR_HEIGHT
    names = [text(f"rank {rank}", x, 2, "soft") for rank, x in enumerate(places)]
    yield (
        "1. Every rank adds its gradient to what it has not sent yet",
        f"v, of {DIM} coordinates. One is large on both ranks, and cancels.",
        two,
        names + [bars(v, x, HALF, OF_A_RANK) for v, x in zip(step.before, places, strict=True)],
    )
    rows, cols = CONFIG.rows, CONFIG.cols
    table = rows * CELL_HEIGHT + 12
    yield (
        "2. …and sketches it",
        f"Every coordinate is added, with a random sign, to one random cell in each of {rows} rows of {cols} columns.",
        table,
        [cells(t, x, HALF) for t, x in zip(step.tables, places, strict=True)],
    )
    yield (
        "3. The sketches are summed on the way",
        "The sketch of the sum; blue is positive, pink negative. Each rank gets the sums of half of the columns.",
        table,
        [cells(step.summed, 0, WIDTH, owners=True)],
    )
    yield (
        f"4. The largest estimates are the {len(candidates)} candidates",
        "An estimate is the median over the rows. Strokes: the true sums, which no rank knows yet.",
        two,
        [
            bars(step.estimates, 0, WIDTH, OF_A_SUM, candidates),
            strokes(torch.stack(step.before).sum(0), WIDTH),
        ],
    )
    sums = torch.zeros(DIM)
    sums[candidates] = torch.stack(step.before).sum(0)[candidates]
    yield (
        f"5. A second round sums the candidates exactly: the {k} largest are the update",
        "Their mean over the ranks becomes p.grad on every rank, to the same bits.",
        two,
        [bars(sums, 0, WIDTH, OF_A_SUM, candidates, chosen)],
    )
    yield (
        "6. What was sent leaves v, everything else waits for later steps",
        "Orange: zero now. Sent and kept add up to what was produced.",
        two,
        names + [bars(v, x, HALF, OF_A_RANK, (), chosen) for v, x in zip(step.after, places, strict=True)],
    )


def draw(step: Step) -> str:
    """The whole picture, as SVG."""
    parts, y = [], 14.0
    for title, words, height, content in panels(step):
        parts += [text(title, 20, y + 20, "title"), text(words, 20, y + 40, "soft")]
        parts.append(f'<g transform="translate(20 {y + 62})">{"".join(content)}</g>')
        y += height + 84
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 40} {y:.0f}" role="img">'
    about = f"<title>One step on two ranks</title><style>{STYLE}</style>"
    card = f'<rect class="card" x="1" y="1" width="{WIDTH + 38}" height="{y - 2:.0f}" rx="8"/>'
    return "\n".join([head, about, card, *parts, "</svg>\n"])


if __name__ == "__main__":
    TARGET.write_text(draw(take_step()))
