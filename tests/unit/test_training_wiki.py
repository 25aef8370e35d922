"""Wiki markup becomes the text that a reader sees."""

from __future__ import annotations

import pytest

from muonlab.training.wiki import articles, plain_text


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("'''Bold''' and ''italic''.", "Bold and italic."),
        ("A [[link]], a [[page|label]].", "A link, a label."),
        ("An [https://example.org outer link] and [https://example.org].", "An outer link and."),
        ("Kept.<ref name=x>dropped {{cite|a}}</ref> Kept.<ref name=x/>", "Kept. Kept."),
        ("Achilles ({{lang|grc|x}}) was", "Achilles was"),
        ("[[File:a.jpg|thumb|a [[nested]] caption]]Text[[Category:B]]", "Text"),
        ("Before\n{| class=wikitable\n! a\n|-\n| b || c\n|}\nAfter", "Before\n\nAfter"),
        ("H<sub>2</sub>O, <math>x^2</math>5&nbsp;&deg;C", "H2O, 5 °C"),
        ("* one\n* two", "one\ntwo"),
        ("== Head ==\ntext\n== See also ==\n* gone\n=== gone ===\n== Next ==\nkept", "Head\n\ntext\n\nNext\n\nkept"),
        ("open <ref>{{never closed</ref> kept", "open kept"),
        ("[[File:a.jpg|thumb|never closed\nkept", "kept"),
        ("<!-- hidden -->shown", "shown"),
    ],
)
def test_markup_becomes_text(raw: str, text: str) -> None:
    assert plain_text(raw) == text


@pytest.mark.slow
def test_no_markup_is_left_in_any_article() -> None:
    texts = list(articles())
    assert len(texts) == 96
    joined = "\n".join(texts)
    for mark in ("[[", "]]", "{{", "}}", "{|", "|}", "<ref", "</", "''", "Category:", "File:", "thumb|"):
        assert mark not in joined, mark
