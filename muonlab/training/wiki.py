"""Encyclopedia articles as plain text, from the dump that the gensim wheel ships for its own tests.

Kept: main-namespace pages that are no redirects and have at least `MIN_CHARACTERS` of text. Dropped from a
page: templates, tables, references, formulas, source code, files, categories, and the sections after the
article proper (`BACK_MATTER`). What the parser cannot balance (a reference that is never closed, a table
inside a template) is cut out by pattern, so that no markup is learned. Nothing of gensim is imported: its
file is only read.
"""

from __future__ import annotations

import bz2
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from muonlab.registry.errors import UsageError

if TYPE_CHECKING:
    from mwparserfromhell.wikicode import Wikicode

LICENCE = "CC BY-SA 3.0 and GFDL"
ATTRIBUTION = (
    "Text of English Wikipedia articles by their contributors (https://en.wikipedia.org/), as excerpted in "
    "the test data of gensim (https://github.com/piskvorky/gensim)."
)
MIN_CHARACTERS = 2000
"""Below this a page is a stub or a list of meanings: 10 of the 106 articles."""

_FILES = "test/test_data/enwiki-latest-pages-articles1.xml-*-shortened.bz2"
_NAMESPACE = "{http://www.mediawiki.org/xml/export-0.10/}"
_DROPPED_TAGS = {
    "ref",
    "references",
    "table",
    "math",
    "gallery",
    "timeline",
    "source",
    "syntaxhighlight",
    "code",
}
_DROPPED_LINKS = {"file", "image", "media", "category"}
BACK_MATTER = {
    *("see also", "notes", "references", "notes and references", "footnotes", "citations", "sources"),
    *("works cited", "bibliography", "further reading", "external links"),
}


def articles() -> Iterator[str]:
    """Yield the text of every article, in the order of the dump."""
    for raw in _pages(_dump()):
        text = plain_text(raw)
        if len(text) >= MIN_CHARACTERS:
            yield text


def _dump() -> Path:
    package = find_spec("gensim")
    folders = list(package.submodule_search_locations or []) if package else []
    found = sorted(file for folder in folders for file in Path(folder).glob(_FILES))
    if not found:
        raise UsageError(
            f"data source gensim-wiki: no {_FILES} in an installed gensim; "
            "run `pip install 'gensim>=4.4'` (the text is in its wheel, its code is not used)."
        )
    return found[0]


def _pages(dump: Path) -> Iterator[str]:
    """Yield the wiki text of every article of the dump, one page in memory at a time."""
    with bz2.open(dump) as stream:
        for _, element in ET.iterparse(stream):  # noqa: S314 - a file of an installed package, not of a user
            if element.tag != f"{_NAMESPACE}page":
                continue
            is_article = element.findtext(f"{_NAMESPACE}ns") == "0"
            if is_article and element.find(f"{_NAMESPACE}redirect") is None:
                yield element.findtext(f"{_NAMESPACE}revision/{_NAMESPACE}text") or ""
            element.clear()


def plain_text(raw: str) -> str:
    """Return the readable text of a page's wiki markup: headings and paragraphs, one blank line between."""
    import mwparserfromhell

    text = _flatten(mwparserfromhell.parse(raw))
    for unbalanced in _UNBALANCED:
        text = unbalanced.sub("", text)
    text = re.sub(r"\(\s*[,;]*\s*\)", "", text)  # what a dropped template leaves: "Achilles ( ) was"
    text = re.sub(r"[ \t\xa0]+", " ", text)
    text = re.sub(r" ([,.;:)])", r"\1", text)
    text = "\n".join(line.strip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


_UNBALANCED = [
    re.compile(r"<ref[^>]*/>|<ref.*?</ref>", re.DOTALL),
    re.compile(r"\{\|.*?\|\}", re.DOTALL),
    re.compile(r"^[ \t]*[|!{].*$", re.MULTILINE),  # a row of a table whose beginning the parser took away
    re.compile(r"^[ \t]*(\[\[)?(File|Image):.*$", re.MULTILINE),  # a picture whose brackets do not close
    re.compile(r"</?[a-z][^>]*>|\[\[|\]\]|\{\{|\}\}|'{2,}|__[A-Z]+__"),
]


def _flatten(code: Wikicode) -> str:
    from mwparserfromhell import nodes

    parts: list[str] = []
    in_back_matter = False
    for node in code.nodes:
        if isinstance(node, nodes.Heading):
            title = _flatten(node.title)
            if node.level == 2:
                in_back_matter = title.strip().casefold() in BACK_MATTER
            if not in_back_matter:
                parts.append(f"\n\n{title}\n\n")
        elif in_back_matter:
            continue
        elif isinstance(node, nodes.Text):
            parts.append(str(node.value))
        elif isinstance(node, nodes.HTMLEntity):
            parts.append(node.normalize())
        elif isinstance(node, nodes.ExternalLink):
            parts.append(_flatten(node.title) if node.title is not None else "")
        elif isinstance(node, nodes.Wikilink):
            if str(node.title).partition(":")[0].strip().casefold() not in _DROPPED_LINKS:
                parts.append(_flatten(node.title if node.text is None else node.text))
        elif isinstance(node, nodes.Tag):
            name = str(node.tag).strip().casefold()
            if name == "br":
                parts.append("\n")
            elif name not in _DROPPED_TAGS and node.contents is not None:
                parts.append(_flatten(node.contents))
    return "".join(parts)
