"""What the package raises, warns of and logs, from its sources: the list on the page about troubleshooting.

``…`` stands for what a message fills in. Where a function makes a part of a message, that is listed where it is made.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
MARK = "<!-- all messages -->"
SAYING = {
    "warn": "warning",
    "warning": "log",
    "error": "log",
    "critical": "log",
    "add_note": "note to an error",
    "BadParameter": "command line",
    "kind": "ValueError or OSError",
}
PART = "part of a message"
PART_WORDS = range(12, 60)
FILLED_IN = re.compile(r"%(?:\.\d)?[dfgrs]")  # of logged messages
GAP = "…"


@dataclass(frozen=True)
class Message:
    """What a user may see: ``text`` with gaps, and as what it arrives, such as "ValueError" or "warning"."""

    text: str
    kind: str


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the list in the place of its mark."""
    return markdown.replace(MARK, "\n\n".join(_sections())) if MARK in markdown else markdown


def messages(source: str) -> Iterator[Message]:
    """The messages of a module, in its order, each once."""
    tree = ast.parse(source)
    names = _texts_by_name(tree)
    seen = set()
    for node in ast.walk(tree):
        kind, said = _said(node)
        text = " ".join(FILLED_IN.sub(GAP, "".join(_text(part, names) for part in said)).split())
        words = len(text.replace(GAP, " ").split())
        if text not in seen and (words in PART_WORDS if kind == PART else words):
            seen.add(text)
            yield Message(text, kind)


def _sections() -> Iterator[str]:
    for path in sorted((ROOT / "hvd_sketch").rglob("*.py")):
        source = path.read_text()
        rows = [f"- `` {message.text} `` ({message.kind})" for message in messages(source)]
        if rows:
            about = (ast.get_docstring(ast.parse(source)) or path.stem).split("\n")[0]
            name = path.relative_to(ROOT).as_posix()
            yield f"**{about}** `{name}`\n\n" + "\n".join(rows)


def _said(node: ast.AST) -> tuple[str, list[ast.expr]]:
    """As what the message of a call arrives, and the expressions that make its text: none, where it is no message."""
    if isinstance(node, ast.Return) and isinstance(node.value, ast.JoinedStr):
        return PART, [node.value]
    if not isinstance(node, ast.Call):
        return "", []
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in SAYING:
        return SAYING[name], node.args[:1]
    if name == "refuse":  # of a saved state: entry, what was expected, what arrived
        return "ValueError", node.args[1:2]
    return (name, node.args[-1:]) if name.endswith("Error") else ("", [])


def _texts_by_name(tree: ast.Module) -> dict[str, str]:
    """Texts that are put together under a name first, where only one is."""
    texts: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            texts.setdefault(node.targets[0].id, []).append(_text(node.value, {}))
    return {name: all_of[0] for name, all_of in texts.items() if len(all_of) == 1 and len(all_of[0].split()) > 2}


def _text(node: ast.AST, names: dict[str, str]) -> str:
    """The constant words of an expression, with gaps between them."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts) | ast.List(elts=parts):
            return "".join(_text(part, names) for part in parts)
        case ast.FormattedValue(value=ast.Name() | ast.IfExp() as value):
            return _text(value, names)
        case ast.BinOp(left=left, right=right):
            return _text(left, names) + _text(right, names)
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(between)), attr="join"), args=[ast.List(elts=many)]
        ):
            return between.join(_text(part, names) for part in many)
        case ast.Call(func=ast.Attribute(value=text, attr="rstrip" | "strip" | "replace")):
            return _text(text, names)
        case ast.IfExp(body=body, orelse=otherwise):
            return " / ".join(filter(None, (_text(body, names), _text(otherwise, names))))
        case ast.Name(id=name):
            return names.get(name, GAP)
    return GAP
