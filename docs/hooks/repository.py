"""Files outside of docs/ that its pages link to, as pages of the site: so every link works, also where no server is.

The README is the first page. Other Markdown and pictures keep their paths; sources are shown as code.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[#)])")  # the path in [text](path#anchor), not an address with a scheme
PICTURES = {".png", ".svg"}
SOURCE_PAGE = """---
search:
  exclude: true
hide: [toc]
---
# {path}

~~~~~~ {language}
{text}
~~~~~~
"""

_shown: dict[str, Path] = {}  # by place in the site


def place(path: Path) -> str:
    """Where a file of the repository is in the site: the ``src_uri`` of its page or picture."""
    if path == ROOT / "README.md":
        return "index.md"
    name = path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()
    return name if path.suffix in {".md", *PICTURES} else f"{name}.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to, and what those link to in turn."""
    _shown.clear()
    waiting = [ROOT / "README.md", *(DOCS / page.src_uri for page in files.documentation_pages())]
    while waiting:
        path = waiting.pop()
        if place(path) in _shown:
            continue
        _shown[place(path)] = path
        if files.get_file_from_path(place(path)) is None:
            files.append(_file(path, config))
        if path.suffix == ".md":
            waiting += [target for target in map(lambda link: _target(path, link), _links(path)) if target.is_file()]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links between files of the repository links between pages."""
    path = _shown.get(page.file.src_uri)
    if path is None or path.suffix != ".md":
        return markdown
    here = Path(page.file.src_uri).parent

    def replace(match: re.Match[str]) -> str:
        target = _target(path, match[1])
        return os.path.relpath(place(target), here) if target.is_file() else match[1]

    return LINK.sub(replace, markdown)


def _links(path: Path) -> list[str]:
    return LINK.findall(path.read_text())


def _target(path: Path, link: str) -> Path:
    return Path(os.path.normpath(path.parent / link))


def _file(path: Path, config: MkDocsConfig) -> File:
    if path.suffix in {".md", *PICTURES}:
        return File.generated(config, place(path), abs_src_path=str(path))
    name = path.relative_to(ROOT).as_posix()
    language = {".py": "python", ".yml": "yaml", ".csv": "text"}.get(path.suffix, "bash")
    text = SOURCE_PAGE.format(path=name, language=language, text=path.read_text().rstrip())
    return File.generated(config, place(path), content=text)
