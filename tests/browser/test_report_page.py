"""The report as a reader's browser shows it: wide and narrow, by day and by night, and on paper."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from reporting_studies import BASELINE, NOISY, NOLAH, STEPS, STRONG, TRIVIAL, made_up, shifted

from muonlab.reporting.report import write_report
from muonlab.reporting.standing import Standing

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ENOUGH = 4.5
"""Contrast that WCAG 2.2 asks of text (AA)."""
PAPER_PX = round((210 - 2 * 14) / 25.4 * 96)
"""Width of A4 without the margins of the page."""
LONG = "a-name-of-63-characters-with-scale-0-95-and-warmup-150-of-arm-"
MARKUP = "<script>alert(1)</script><img src='http://example.org/x.png'> & \u202e" + "x" * 300 + " <b>bold</b>\n# head"

TEXT_CONTRASTS = """() => {
  // The contrast of every text that can be seen with the ground it stands on.
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b]
    .map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const [r, g, b, alpha = 1] = parse(getComputedStyle(e).backgroundColor);
      if (alpha === 1) return [r, g, b];
      if (alpha !== 0) throw new Error("a ground that lets another through is not computed here");
    }
    return [255, 255, 255];
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility({ visibilityProperty: true })) continue;
    const pair = [parse(getComputedStyle(element).color), ground(element)].map(luminance);
    const [dim, bright] = pair.sort((a, b) => a - b);
    found.push([(bright + 0.05) / (dim + 0.05), texts.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
}"""


def measured(size: float, seed: int) -> dict[str, list[tuple[int, float]]]:
    """What an optimizer did in a run."""
    steps = range(30, STEPS + 1, 30)
    return {
        "grad_norm": [(step, 1.5 + seed / step) for step in steps],
        "opt_momentum_rms": [(step, size * (1 + step / STEPS)) for step in steps],
        "opt_turn": [(step, size / (1 + size)) for step in steps],
        "opt_effective_rank_share_after": [(step, 0.5 + 0.1 * size * step / STEPS) for step in steps],
    }


def studies() -> dict[str, Standing]:
    arms = {"muon": BASELINE, "nolah": NOLAH, "orthonoise": TRIVIAL, "isotropic": NOISY, "adamw": shifted([-0.3] * 5)}
    return {
        "five arms, five seeds": made_up(
            arms,
            control=["isotropic"],
            reference=["adamw"],
            on_archive="orthonoise",
            price=2.8,
            samples=dict.fromkeys(arms, "the city of the city of " * 8),
            series={arm: partial(measured, 10.0**-i) for i, arm in enumerate(arms)},
        ),
        "nasty": made_up(
            {LONG + "0": [*BASELINE[:4], "diverged"], LONG + "1": [*NOLAH[:3], "failed", None], LONG + "2": STRONG},
            question=MARKUP,
            findings=[MARKUP],
            amended=True,
            samples={LONG + "0": MARKUP, LONG + "1": "w" * 3000},
        ),
        "no run": made_up({"muon": [None] * 3, "k": [None] * 3}),
        "long table": made_up(
            {f"arm-{i}": shifted([0.001 * i] * 13, [*BASELINE] * 3) for i in range(5)}, decision={"n_max": 20}
        ),
    }


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, standing in studies().items():
        out = tmp_path_factory.mktemp("report")
        write_report(standing, out)
        found[name] = out / "report.html"
    return found


def opened(browser: Browser, path: Path, width: int, scheme: str) -> tuple[Page, list[str]]:
    """The page, and what went wrong or over the network while it was read."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    page.on("dialog", lambda dialog: trouble.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: trouble.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(path.as_uri())
    trouble.remove(path.as_uri())
    return page, trouble


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_asks_for_nothing(browser, pages, width, scheme):
    for name, path in pages.items():
        page, trouble = opened(browser, path, width, scheme)
        assert trouble == [], name
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        images = page.evaluate("[...document.images].map(i => [i.alt.length, i.complete && i.naturalWidth])")
        assert all(alt > 20 and drawn for alt, drawn in images), name
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(browser, pages, scheme):
    for name, path in pages.items():
        page, _ = opened(browser, path, 1280, scheme)
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        found = page.evaluate(TEXT_CONTRASTS)
        assert len(found) > 50, name
        assert [text for ratio, text in found if ratio < ENOUGH] == [], name
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (scheme == "dark"), name
        page.close()


def test_a_link_leads_to_its_section(browser, pages):
    page, trouble = opened(browser, pages["five arms, five seeds"], 1280, "light")
    link = page.locator("nav a").last
    link.click()
    heading = page.locator("h2", has_text=link.inner_text())
    assert heading.bounding_box()["y"] < 900
    # To the section's own address, within the same file.
    assert [address for address in trouble if "#" not in address] == []


def test_what_others_wrote_stays_text(browser, pages):
    page, trouble = opened(browser, pages["nasty"], 1280, "light")
    assert trouble == []
    assert page.evaluate("document.querySelectorAll('script, b, iframe, object, form').length") == 0
    assert "<script>alert(1)</script>" in page.inner_text("body")


def test_it_prints_on_white_with_all_rows(browser, pages, tmp_path):
    for name, most in (("five arms, five seeds", 12), ("nasty", 14), ("long table", 14), ("no run", 6)):
        page, _ = opened(browser, pages[name], 1280, "dark")
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)", name
        # A4 without its margins: nothing may stand beyond the right edge.
        page.set_viewport_size({"width": PAPER_PX, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= PAPER_PX, name
        folded = page.evaluate("[...document.querySelectorAll('details table')].map(t => t.checkVisibility())")
        assert all(folded), name
        printed = page.pdf(path=tmp_path / "report.pdf", format="A4")
        assert 2 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= most, name
        page.close()
