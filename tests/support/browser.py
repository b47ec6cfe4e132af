"""What a page looks like in headless Chromium, at any width, light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LIMIT_S = 60
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
# In the page, once it is drawn. A text that is not within its chart is cut off.
LOOK = """
<script>
addEventListener("load", () => {
  const box = (element) => element.getBoundingClientRect();
  const outside = (text) => {
    const [inner, outer] = [box(text), box(text.closest(".chart"))];
    return inner.width && (inner.left < outer.left - 1 || inner.right > outer.right + 1
      || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1);
  };
  const texts = [...document.querySelectorAll(".chart text")];
  parent.postMessage({
    width: innerWidth,
    drawn_ms: performance.now(),
    too_wide: [document.documentElement, ...document.querySelectorAll("section, .table")]
      .filter((element) => element.scrollWidth > element.clientWidth + 1).map((element) => element.textContent),
    cut_off: texts.filter(outside).map((text) => text.textContent),
    overlapping: [...document.querySelectorAll(".chart")].filter((chart) => {
      const [legend, title] = [".legend", ".xtitle"].map((name) => chart.querySelector(name));
      return legend && title && box(legend).bottom > box(title).top + 1 && box(legend).top < box(title).bottom - 1;
    }).map((chart) => chart.ariaLabel),
    texts: texts.length,
    charts: [...document.querySelectorAll(".chart")].map((chart) => chart.querySelectorAll(".main-svg").length),
    page: getComputedStyle(document.body).backgroundColor,
    ink: texts.length && getComputedStyle(texts[0]).fill,
    loaded: performance.getEntriesByType("resource").map((entry) => entry.name),
  }, "*");
});
</script>
"""
FRAMES = """<body>
<pre id="found"></pre>
<script>
const told = [];
addEventListener("message", (event) => {
  told.push(event.data);
  document.getElementById("found").textContent = JSON.stringify(told);
});
</script>
"""
FRAME = '<iframe src="looked-at.html" width="{}" height="3000" style="border:0"></iframe>'


def look_at(page: Path, folder: Path, widths: Sequence[int], is_dark: bool) -> list[dict[str, Any]]:
    """What the page says of itself in windows of some widths; see LOOK.

    Args:
        folder: for files of this function.
    """
    (folder / "looked-at.html").write_text(page.read_text() + LOOK)
    # In frames: a window of its own is at least 500 pixels wide.
    frames = [
        f'<iframe src="looked-at.html" width="{width}" height="3000" style="border:0"></iframe>' for width in widths
    ]
    outer = folder / "frames.html"
    outer.write_text(FRAMES + "\n".join(frames))
    dumped = _chromium(outer, is_dark, "--dump-dom")
    found = re.search(r'<pre id="found">(.+?)</pre>', dumped, re.S)
    assert found, dumped[-2000:]
    seen: list[dict[str, Any]] = json.loads(html.unescape(found[1]))
    assert sorted(each["width"] for each in seen) == sorted(widths)
    return seen


def _chromium(page: Path, is_dark: bool, *wanted: str) -> str:
    assert CHROMIUM is not None
    scheme = f"--blink-settings=preferredColorScheme={0 if is_dark else 1}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,3000", "--timeout=20000", scheme]
    done = subprocess.run([CHROMIUM, *options, *wanted, page.as_uri()], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout
