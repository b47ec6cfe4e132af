"""What a page looks like in headless Chromium, at any width, light and dark.

``python -m tests.support.browser report.html --screenshots FOLDER`` says how fast a page opens, and takes pictures.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
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
WIDTHS = (400, 1400)
HEIGHT = 3000
FRAME = '<iframe src="{}" width="{}" height="{}" style="border:0"></iframe>'


def look_at(page: Path, folder: Path, widths: Sequence[int], is_dark: bool) -> list[dict[str, Any]]:
    """What the page says of itself in windows of some widths; see LOOK.

    Args:
        folder: for files of this function.
    """
    (folder / "looked-at.html").write_text(page.read_text() + LOOK)
    # In frames: a window of its own is at least 500 pixels wide.
    outer = folder / "frames.html"
    outer.write_text(FRAMES + "\n".join(FRAME.format("looked-at.html", width, HEIGHT) for width in widths))
    dumped = _chromium(outer, is_dark, "--dump-dom")
    found = re.search(r'<pre id="found">(.+?)</pre>', dumped, re.S)
    assert found, dumped[-2000:]
    seen: list[dict[str, Any]] = json.loads(html.unescape(found[1]))
    assert sorted(each["width"] for each in seen) == sorted(widths)
    return seen


def take_pictures(page: Path, folder: Path, widths: Sequence[int] = WIDTHS, height: int = HEIGHT) -> list[Path]:
    """PNGs of the top of the page, light and dark, in ``folder``: ``report-400-dark.png`` of ``report.html``."""
    taken = []
    for width, is_dark in product(widths, (False, True)):
        with TemporaryDirectory() as frames:
            outer = Path(frames, "frame.html")
            outer.write_text('<body style="margin:0">' + FRAME.format(page.absolute().as_uri(), width, height))
            taken.append(folder / f"{page.stem}-{width}-{'dark' if is_dark else 'light'}.png")
            size = f"--window-size={width},{height}"
            _chromium(outer, is_dark, f"--screenshot={taken[-1].absolute()}", size, "--virtual-time-budget=10000")
    return taken


def _chromium(page: Path, is_dark: bool, *wanted: str) -> str:
    assert CHROMIUM is not None
    scheme = f"--blink-settings=preferredColorScheme={0 if is_dark else 1}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1500,3000", "--timeout=20000", scheme]
    done = subprocess.run([CHROMIUM, *options, *wanted, page.as_uri()], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--screenshots", type=Path, metavar="FOLDER", help="put pictures there")
    parser.add_argument("--height", type=int, default=HEIGHT, help="of a picture (default: %(default)s)")
    arguments = parser.parse_args()
    if CHROMIUM is None:
        parser.error("Chromium was not found: expected chromium, google-chrome or chromium-browser in PATH")
    with TemporaryDirectory() as folder:
        for is_dark in (False, True):
            for seen in look_at(arguments.page, Path(folder), WIDTHS, is_dark):
                found = {what: seen[what] for what in ("too_wide", "cut_off", "overlapping") if seen[what]}
                print(f"{seen['width']} px, {'dark' if is_dark else 'light'}: {found or 'nothing is cut off'}")
        opened_ms = look_at(arguments.page, Path(folder), WIDTHS[-1:], False)[0]["drawn_ms"]
    print(f"{arguments.page.stat().st_size / 1e6:.2f} MB, drawn after {opened_ms / 1e3:.2f} s")
    if arguments.screenshots is not None:
        arguments.screenshots.mkdir(parents=True, exist_ok=True)
        print(*take_pictures(arguments.page, arguments.screenshots, height=arguments.height), sep="\n")


if __name__ == "__main__":
    main()
