"""The command line's commands and options, from the commands themselves: the list on the page about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from typer.main import get_command

from hvd_sketch.__main__ import app

MARK = "<!-- all commands -->"
PROGRAM = "hvd-sketch"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the list in the place of its mark."""
    return markdown.replace(MARK, "\n".join(_lines())) if MARK in markdown else markdown


def _lines() -> Iterator[str]:
    program: Any = get_command(app)
    context = program.context_class(program, info_name=PROGRAM)
    for name in program.list_commands(context):
        command = program.get_command(context, name)
        inner = command.context_class(command, info_name=name, parent=context)
        yield from (f"\n## {name}\n", command.help, "\n```", command.get_usage(inner).removeprefix("Usage: "), "```\n")
        yield from ("| argument or option | what it means |", "|---|---|")
        for parameter in command.get_params(inner):
            names, about = parameter.get_help_record(inner)
            yield f"| `{_cell(names)}` | {_cell(about).replace('<', '&lt;')} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")
