"""The documentation site builds without a warning, none of its links is broken, and it has every message."""

from __future__ import annotations

import ast
import html
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import torch
from typer.testing import CliRunner

import hvd_sketch
from docs.hooks.messages import GAP, messages
from docs.pictures import step as picture
from hvd_sketch.__main__ import app

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "hvd_sketch").rglob("*.py"))
LOGGED = {"warn", "warning", "error", "critical"}


class Page(HTMLParser):
    """Links, places to link to, files that are loaded, and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.places: set[str] = set()
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.places |= {given[name] or "" for name in ("id", "name") if name in given}
        if tag == "a" and given.get("href"):
            self.links.add(given["href"] or "")
        for name in {"script": ["src"], "img": ["src"], "link": ["href"]}.get(tag, []):
            if given.get(name):
                self.loaded.add(given[name] or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path: Page(path) for path in folder.rglob("*.html") if path.name != "404.html"}


def test_no_link_is_broken_and_nothing_is_loaded_from_elsewhere(site: dict[Path, Page]) -> None:
    broken = []
    for path, page in site.items():
        for link in page.links | page.loaded:
            address, place = urldefrag(link)
            if urlsplit(address).scheme:
                broken += [f"{path.name} loads {link}"] * (link in page.loaded)
                continue
            target = (path.parent / unquote(address)).resolve() if address else path
            there = site.get(target)
            if not target.is_file() or (place and there and unquote(place) not in there.places):
                broken.append(f"{path.name}: {link}")
    assert not broken, broken
    assert len(site) > 30 and sum(len(page.links) for page in site.values()) > 1000


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"^ *- (?:\w+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages and not pages - listed, "add them to nav in mkdocs.yml"


def test_every_public_name_is_in_the_api(site: dict[Path, Page]) -> None:
    page = next(page for path, page in site.items() if path.name == "api.html")
    missing = {name for name in hvd_sketch.__all__ if f"hvd_sketch.{name}" not in page.places | {page.text}}
    assert missing <= {"__version__", "HASH_VERSION"}, missing
    assert ":class:" not in page.text and "hvd_sketch.HASH_VERSION" in page.text


def test_every_option_of_the_command_line_is_found(site: dict[Path, Page]) -> None:
    """As --help prints them in a wide terminal."""
    page = next(page for path, page in site.items() if path.name == "commands.html")
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert commands >= {"plan", "doctor", "report", "warm-up", "merge-traces"} and commands <= page.places
    for name in commands:
        done = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
        options = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", done.output))
        assert "--json" in options and not [option for option in options if option not in page.text], name
    assert "--no-self-test" in page.text and "[default: 1gbit]" in page.text


def fragments(node: ast.AST) -> Iterator[str]:
    """Constant words of what a statement raises or says, of at least two words."""
    for constant in ast.walk(node):
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
            for part in re.split(r"%\S*[a-z]", " ".join(constant.value.split())):
                if len(part.split()) > 1 and "join" not in part:
                    yield part.strip()


def test_what_is_raised_and_warned_of_is_found(site: dict[Path, Page]) -> None:
    """By every statement's constant words, of which the list on the page knows nothing."""
    page = next(page for path, page in site.items() if path.name == "troubleshooting.html")
    text, missing, looked_for = " ".join(page.text.split()), [], 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            said: list[ast.AST] = []
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                said = list(node.exc.args)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOGGED:
                said = list(node.args[:1])
            for fragment in (fragment for part in said for fragment in fragments(part)):
                looked_for += 1
                missing += [f"{path.name}: {fragment}"] * (fragment not in text)
    assert not missing, missing
    assert looked_for > 200


@cache
def listed() -> list[str]:
    return [message.text for path in SOURCES for message in messages(path.read_text())]


WRONG: list[Callable[[], object]] = [
    lambda: hvd_sketch.SketchConfig(k=0, candidates="nominate"),
    lambda: hvd_sketch.SketchConfig(k=5, candidates="nominate", oversample=2),
    lambda: hvd_sketch.recommended([torch.zeros(64, 64), torch.zeros(64)], ratio=1e5, ranks=2),
    lambda: hvd_sketch.DistributedOptimizer(torch.optim.SGD([torch.zeros(3)]), transport="carrier pigeon"),
    lambda: hvd_sketch.CountSketch(10, 3, 5).accumulate_(torch.zeros(3, dtype=torch.float64)),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_real_message_is_one_of_those_listed(wrong: Callable[[], object]) -> None:
    with pytest.raises(ValueError) as raised:
        wrong()
    said = " ".join(str(raised.value).split())
    patterns = [".*?".join(map(re.escape, text.split(GAP))) for text in listed() if len(text) > 20]
    assert any(re.fullmatch(pattern, said) for pattern in patterns), said


def test_messages_with_advice_exist() -> None:
    """Every heading in backticks on the page about troubleshooting is a part of a message."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = [part for line in re.findall(r"^### (`.*)$", page, re.M) for part in re.findall(r"`([^`]+)`", line)]
    assert len(quoted) > 30
    assert not [part for part in quoted if not any(part in text for text in listed())]


def test_the_picture_is_of_this_package() -> None:
    assert picture.TARGET.read_text() == picture.draw(picture.take_step()), "python -m docs.pictures.step"
    assert html.unescape(picture.TARGET.read_text()).count("<text") > 10


def test_the_bytes_that_are_told_are_the_ledgers() -> None:
    """The table of docs/bytes.md, of 100 steps with four ranks. All steps send as much."""
    tutorial, told = ((ROOT / "docs" / name).read_text() for name in ("tutorial.md", "bytes.md"))
    layers = re.search(r"model = (nn\.Sequential\(.*\))", tutorial)
    assert layers is not None
    model = eval(layers[1], {"nn": torch.nn})
    compression = hvd_sketch.recommended(model.parameters(), ratio=100, ranks=4)
    simulation = hvd_sketch.Simulation(model.named_parameters(), compression, ranks=4)
    for rank in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        simulation.accumulate(rank)
    simulation.agree()
    phases = simulation.ledger.by_phase()
    totals = simulation.ledger.totals()
    left, right, agree = (f"{100 * phases[name].payload_bytes:,}" for name in ("left", "right", "agree"))
    sent_left, sent_right = (f"{100 * phases[name].wire_bytes:,.0f}" for name in ("left sums", "right sums"))
    for row in (
        f"| agree | allreduce | {agree} |",
        f"| 2 × {left} | 2 × {sent_left} |",
        f"| 2 × {right} | 2 × {sent_right} |",
        f"| | | {100 * totals.payload_bytes:,} | {100 * totals.wire_bytes:,.0f} |",
        f"bytes: {simulation.ledger.compression_ratio():.0f} times as many",
    ):
        assert row in told, row
