"""Roles of Sphinx in docstrings, such as :class:`~package.module.Name`, as the name alone."""

from __future__ import annotations

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ROLE = re.compile(r":(?:class|func|meth|mod|attr):<code>(~?)([\w.]+)</code>")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show ``~package.module.Name`` as ``Name``."""
    return ROLE.sub(lambda role: f"<code>{role[2].split('.')[-1] if role[1] else role[2]}</code>", html)
