"""The page of a report: one file of HTML with all that it needs, for screens of any width, light and dark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from hvd_sketch.report.charts import Chart
from hvd_sketch.report.tables import Table

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #5b6675; --page: #f4f5f7; --card: #fff; --line: #d9dde3;
  --mark: #fff3d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --dim: #a0a9b6; --page: #14171c; --card: #1d2128;
  --line: #363c46; --mark: #3d3420; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 1rem; background: var(--page); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 1500px; margin: auto; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
h1 { font-size: 1.3rem; max-width: 1500px; margin: 0 auto 1rem; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; min-width: 0; }
h2 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
section > p { margin: .2rem 0 .4rem; color: var(--dim); font-size: .87rem; }
.chart { height: 22rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .5rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--dim); min-width: 8rem; }
thead th { color: var(--ink); min-width: 5rem; }
tr.differs td { background: var(--mark); }
.js-plotly-plot text { fill: var(--ink) !important; }
.js-plotly-plot .xgrid, .js-plotly-plot .ygrid, .js-plotly-plot .zl { stroke: var(--line) !important; }
"""
LAYOUT: dict[str, Any] = {
    "autosize": True,
    "margin": {"l": 12, "r": 12, "t": 8, "b": 12},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"size": 12, "family": "system-ui, sans-serif"},
    "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "bgcolor": "rgba(0,0,0,0)"},
    "hovermode": "closest",
    "xaxis": {"automargin": True},
    "yaxis": {"automargin": True},
}
# A finger that moves over a chart moves the page.
DRAW = """
const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
for (const [number, {data, layout}] of charts.entries())
  Plotly.newPlot("chart" + number, data, {dragmode, ...layout}, {responsive: true, displayModeBar: false});
"""


def page(title: str, tables: Sequence[Table], charts: Sequence[Chart], names: Sequence[str], plotly: str) -> str:
    """The whole page.

    Args:
        title: of the page.
        tables: with a column for each run.
        charts: in order.
        names: of the runs.
        plotly: the source of Plotly's script.
    """
    first, *others = [_table(table, names) for table in tables]
    drawn = [{"data": chart.data, "layout": _layout(chart)} for chart in charts]
    cards = [_card(number, chart) for number, chart in enumerate(charts)]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<main>
{"".join([first, *cards, *others])}
</main>
<script>{plotly}</script>
<script>
const charts = {_as_script(drawn)};
{DRAW}
</script>
</body>
</html>
"""


def _layout(chart: Chart) -> dict[str, Any]:
    """The chart's own settings over those of all."""
    merged = {**LAYOUT, **chart.layout}
    for axis in ("xaxis", "yaxis"):
        merged[axis] = {**LAYOUT[axis], **chart.layout.get(axis, {})}
    return merged


def _as_script(value: Any) -> str:
    """JSON that may stand inside of a script element, whatever names the runs have."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _card(number: int, chart: Chart) -> str:
    about = f"<p>{escape(chart.about)}</p>" if chart.about else ""
    title = escape(chart.title)
    drawn = f'<div class="chart" id="chart{number}" role="img" aria-label="{title}"></div>'
    return f"<section><h2>{title}</h2>{about}{drawn}</section>\n"


def _table(table: Table, names: Sequence[str]) -> str:
    """A column for each run; rows in which they differ are marked."""
    heads = "".join(f"<th>{escape(name)}</th>" for name in ("", *names))
    rows = []
    for name, texts in table.rows:
        differs = ' class="differs"' if len(set(texts)) > 1 and table.marks else ""
        cells = "".join(f"<td>{escape(text)}</td>" for text in texts)
        rows.append(f"<tr{differs}><th>{escape(name)}</th>{cells}</tr>\n")
    return (
        f'<section><h2>{escape(table.title)}</h2><div class="table"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>\n"
    )
