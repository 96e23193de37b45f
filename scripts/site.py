"""What the site needs beyond Markdown: MkDocs hooks, and one of griffe's extensions.

Pages link to files of the repository as they lie there, `../conf/config.yaml`. The site gets a copy of each
under files/, so that such a link works in both places; one to a file that is not there is a warning.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PROJECT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"\]\(\.\./((?:(?!\.\.)[^)#\s])+)\)")
"""The target of a link that leaves docs/."""

log = logging.getLogger("mkdocs.hooks.site")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file of the repository that a page links to."""
    pages = [page for page in files.documentation_pages() if "/" not in page.src_uri]
    for path in sorted({path for page in pages for path in OUTSIDE.findall(page.content_string)}):
        if (PROJECT / path).is_file():
            files.append(File.generated(config, copy_of(path), abs_src_path=str(PROJECT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the repository point to their copies."""

    def target(match: re.Match[str]) -> str:
        path = match[1]
        if files.get_file_from_path(copy_of(path)) is None:
            log.warning("%s links to %s, which is no file of the repository", page.file.src_uri, path)
        return f"]({copy_of(path)})"

    return OUTSIDE.sub(target, markdown)


def copy_of(path: str) -> str:
    """Where the site has a file of the repository; Markdown as text, since it is no page of the site."""
    return f"files/{path}" + (".txt" if path.endswith(".md") else "")


class Checked(griffe.Extension):
    """Settings made by `smi_fed.checks.checked` are shown with their fields, as dataclasses are."""

    def on_class_instance(self, *, cls: griffe.Class, **_: object) -> None:
        """Tell griffe what `checked` makes of a class."""
        if any(getattr(each.value, "name", "") == "checked" for each in cls.decorators):
            dataclass = griffe.ExprName("dataclasses.dataclass")
            cls.decorators.append(griffe.Decorator(dataclass, lineno=None, endlineno=None))
