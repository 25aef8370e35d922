"""Counting the padding makes a loss look better than it is; the tokens here hold none (docs/data.md has the figure)."""

from __future__ import annotations

import importlib
from itertools import islice
from pathlib import Path

import pytest
from training_toy import TOY

from muonlab.training import wiki
from muonlab.training.data import TokenData

pytest_plugins = ["training_fixtures"]

SCRIPTS = Path(__file__).parents[2] / "docs" / "figures"


@pytest.mark.slow
def test_a_loss_that_counts_padding_is_lower_by_the_share_of_it(
    toy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    padding = importlib.import_module("padding")
    paragraphs = [text for article in islice(wiki.articles(), 6) for text in article.split("\n\n")]
    found = padding.measure(TOY, TokenData.open(toy_data), paragraphs, steps=60)
    assert 0.05 < found.share < 0.95
    assert found.counted == pytest.approx((1 - found.share) * found.text + found.share * found.padding)
    assert found.padding < 0.8 * found.text, "padding is learned first"
    assert found.counted < found.text
    assert abs(found.packed - found.text) < 0.5 * (found.text - found.counted), "packed text is scored as text"
