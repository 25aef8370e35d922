"""Take the pictures of the README: docs/screenshots/report.png and mlflow.png, of the study that params.yaml names.

The report's top, and the study's curves by arm in MLflow's UI, as Debian's chromium shows them at 1280 pixels by day.
The study must have its report: `make study` comes first. `muon ui` is started on a free port and ended again.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import load_params

WIDTH = 1280
REPORT_HEIGHT, MLFLOW_HEIGHT = 1500, 900
START_S, SHOWN_MS, SETTLED_MS = 120, 60_000, 2_000
BY_ARM = "by-arm"
"""The view of curves by arm, as muonlab.tracking names it."""


def main() -> None:
    """Both pictures, or one sentence about what is missing."""
    layout = Layout.find()
    study = load_params(layout.params).study
    report = layout.main / "reports" / study / "report.html"
    if not report.exists():
        sys.exit(f"reports/{study}/report.html is missing; run `make study` first.")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("chromium is missing; install it first (Debian: apt-get install chromium).")
    from playwright.sync_api import sync_playwright

    out = Path(__file__).parent
    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=args)
        page = browser.new_page(viewport={"width": WIDTH, "height": REPORT_HEIGHT}, color_scheme="light")
        page.goto(report.resolve().as_uri())
        save(page, out / "report.png")
        page.set_viewport_size({"width": WIDTH, "height": MLFLOW_HEIGHT})
        page.set_default_timeout(SHOWN_MS)
        with mlflow_ui(layout.main) as address:
            show_curves(page, address, study)
            save(page, out / "mlflow.png")
        browser.close()


def save(page: Any, path: Path) -> None:
    """What the page shows, as a small PNG: a palette, a third of the size.

    Maximum coverage keeps a thin line's rare colour; the median cut gave two arms the same.
    """
    picture = Image.open(io.BytesIO(page.screenshot(animations="disabled"))).convert("RGB")
    small = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(f"{path.name}: {small.width} x {small.height}, {path.stat().st_size:,} bytes")


@contextmanager
def mlflow_ui(folder: Path) -> Iterator[str]:
    """The address of a running `muon ui`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "muonlab.cli", "ui", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        try:
            until = time.monotonic() + START_S
            while not answers(f"http://127.0.0.1:{port}/health"):
                if server.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    sys.exit(f"`muon ui` does not answer:\n{log.read().decode(errors='replace')}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGTERM)  # with the workers that it started
            server.wait(10)


def answers(address: str) -> bool:
    """Whether something is served there."""
    try:
        with urllib.request.urlopen(address, timeout=2):  # noqa: S310 - an address of this machine
            return True
    except OSError:
        return False


def show_curves(page: Any, address: str, study: str) -> None:
    """Open the study's curves by arm, and wait until they are drawn."""
    name = urllib.parse.urlencode({"experiment_name": study})
    with urllib.request.urlopen(f"{address}/api/2.0/mlflow/experiments/get-by-name?{name}") as answer:  # noqa: S310
        experiment = json.load(answer)["experiment"]["experiment_id"]
    page.goto(f"{address}/#/experiments/{experiment}/runs?viewStateShareKey={BY_ARM}&compareRunsMode=CHART")
    line = page.locator(".js-plotly-plot .scatterlayer path.js-line").first
    line.wait_for(state="attached")
    for aside in ("Hide banner", "Close", "Toggle sidebar"):  # the note on shared views, the assistant, the menu
        page.get_by_role("button", name=aside, exact=True).click()
    line.wait_for(state="attached")
    page.wait_for_timeout(SETTLED_MS)


if __name__ == "__main__":
    main()
