"""`muon ui` as a person sees it: the study with its runs under it, curves by arm, and the report.

The real command on a repository that has a ledger, outputs and a report, but no mlflow.db: all that is shown was
rebuilt from these.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from muonlab.registry import ledger
from muonlab.registry.record import RunRecord

pytestmark = [pytest.mark.browser, pytest.mark.slow]

STUDY = "001-a-study"
START_S = 150.0
SHOWN_MS = 60_000
HASHES = ("data", "tokenizer", "init", "order", "weights", "code", "environment")
PROVENANCE = ("commit", "python", "torch", "transformers", "device", "host_os")
DECISION = "Adopt nolah."
REPORT = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Report</title><meta '
    """http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">"""
    f"</head><body><h1>{DECISION}</h1></body></html>"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory, browser):
    """Address of a running `muon ui`; asks for the browser first, so that nothing is started where there is none."""
    main = tmp_path_factory.mktemp("repository")
    fill(main)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "MUONLAB_"))}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "muonlab.cli", "ui", "--rebuild", "--port", str(port)]
    with (main / "ui.log").open("wb") as log:
        ui = subprocess.Popen(command, cwd=main, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            yield wait_for(f"http://127.0.0.1:{port}", ui, main / "ui.log")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ui.pid, signal.SIGTERM)  # with the server that it started
            ui.wait(60)


def wait_for(address: str, ui: subprocess.Popen[bytes], log: Path) -> str:
    until = time.monotonic() + START_S
    while time.monotonic() < until and ui.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return address
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"`muon ui` does not answer:\n{log.read_text()}")


def fill(main: Path) -> None:
    """Two arms, two seeds: records in the ledger, curves in runs/, a report."""
    (main / "params.yaml").touch()
    (main / "dvc.yaml").touch()
    records = []
    for arm, gain in (("muon", 0.0), ("nolah", 0.5)):
        for seed in range(2):
            losses = [{"step": step, "val_loss": 5 - gain - step / 100 + seed / 10} for step in range(0, 101, 10)]
            name = f"{arm}-{seed}"
            record = RunRecord.model_validate(
                {"study": STUDY, "workload": "toy", "arm": arm, "seed": seed, "cell_digest": name, "attempt": 1}
                | {"attempt_id": name, "started_at": "2030-01-02T03:04:05+00:00", "registration": None}
                | {"status": "completed", "resumed_from_step": 0, "final_step": 100, "tokens": 100, "device_count": 1}
                | {"wall_seconds": 50.0, "cost_usd": 0.1, "val_loss": 4.0, "perplexity": 55.0, "curve": losses}
                | {"hashes": dict.fromkeys(HASHES, "d")}
                | {"provenance": dict.fromkeys(PROVENANCE, "p") | {"dirty": False}}
            )  # fmt: skip
            records.append(record)
            folder = main / "runs" / STUDY / name
            folder.mkdir(parents=True)
            (folder / "train.json").write_text(record.model_dump_json())
            rows = "".join(f"{p['step']},{p['step'] / 2},{p['val_loss']},{p['val_loss']}\n" for p in losses)
            (folder / "curve.csv").write_text("step,seconds,train_loss,val_loss\n" + rows)
    ledger.append(main / "experiments" / "ledger.jsonl", records)
    report = main / "reports" / STUDY
    report.mkdir(parents=True)
    verdict = {"complete": True, "decision": DECISION, "verdicts": {"nolah": {"verdict": "GO"}}}
    (report / "verdict.json").write_text(json.dumps(verdict))
    (report / "report.md").write_text(f"# {DECISION}\n")
    (report / "report.html").write_text(REPORT)


@pytest.fixture
def page(browser):
    opened = browser.new_page(viewport={"width": 1500, "height": 1000})
    opened.set_default_timeout(SHOWN_MS)
    yield opened
    opened.close()


def test_the_runs_lie_under_their_study_and_its_report_opens(page, address):
    page.goto(f"{address}/#/experiments/1/runs")
    study = page.get_by_role("gridcell").filter(has=page.get_by_role("link", name=STUDY))
    study.wait_for()
    child = page.get_by_role("link", name="nolah/seed-1")
    assert child.count() == 0
    study.get_by_role("button").click()
    child.wait_for()
    shown = page.get_by_role("gridcell").get_by_role("link", name="/seed-").all_inner_texts()
    assert sorted(shown) == ["muon/seed-0", "muon/seed-1", "nolah/seed-0", "nolah/seed-1"]
    page.get_by_role("gridcell").get_by_role("link", name=STUDY).click()
    page.get_by_text(DECISION, exact=True).wait_for()
    page.get_by_text("verdict: nolah: GO").first.wait_for()
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("report.html").first.click()
    report = page.frame_locator("iframe").get_by_role("heading", name=DECISION)
    report.wait_for()


def test_the_curves_are_drawn_by_arm_the_losses_first(page, address):
    page.goto(f"{address}/#/experiments/1/runs")
    page.get_by_role("button", name="Views").click()
    page.get_by_text("Curves by arm").click()
    page.get_by_text("shared view").first.wait_for()
    page.goto(f"{page.url}&compareRunsMode=CHART")
    for arm in ("muon", "nolah"):
        page.get_by_text(f"Group: {arm}").wait_for()
    chart = page.locator(".js-plotly-plot").first
    chart.wait_for()
    chart.locator(".scatterlayer path.js-line").first.wait_for(state="attached")
    assert chart.locator(".scatterlayer path.js-line").count() >= 2  # a line an arm
    titles = page.get_by_text(re.compile(r"^curve/")).all_inner_texts()
    assert titles[0] == "curve/val_loss"
