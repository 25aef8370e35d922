"""Debian's chromium, driven by playwright: a real browser for what only a browser can tell.

Playwright, not selenium: it drives the chromium that is installed and needs nothing beside it (selenium needs a
chromedriver of the very same version), and it has media, requests, console and PDF in its interface, where selenium
leaves them to logs and raw protocol. No browser is downloaded: without chromium these tests are skipped, and say so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless chromium; `browser.new_page(...)` opens a page of its own profile.

    Of a module and no longer: playwright's event loop in this thread is in the way of asyncio in other tests.
    """
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    # Chromium's sandbox refuses to run as root.
    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=executable, args=args)
        try:
            yield started
        finally:
            started.close()
