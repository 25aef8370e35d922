"""`muon report`: the study's own bytes when it is whole, what is missing when it is not, and a watch beside a run.

The study is trained by a real `muon study run`, with a real `muon report --watch` beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import STUDY, Maker, Repository

from muonlab.pipeline.fingerprint import write_fingerprints
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import load_params, load_study, study_cells
from muonlab.pipeline.watch import watch_study

pytestmark = pytest.mark.slow

REPORTS = Path("reports") / STUDY
VERDICTS = ("NO_GO", "EQUIVALENT", "INCONCLUSIVE", "INCOMPLETE", "INVALID", "Undecided")


class Followed(NamedTuple):
    """A study that ran under watch: the repository, the partial reports that were seen, and how the watch ended."""

    repository: Repository
    partials: list[str]
    watch: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def followed(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> Followed:
    repository = make(tmp_path_factory.mktemp("watch") / "repository")
    partial = repository.root / REPORTS / "partial.html"
    command = [sys.executable, "-m", "muonlab.cli", "report", "--watch"]
    with subprocess.Popen(
        command,
        cwd=repository.root, env=repository.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as watch:  # fmt: skip
        assert watch.stderr is not None
        waiting = watch.stderr.readline()  # now it follows: no page of the run is missed
        runner = subprocess.Popen(
            [sys.executable, "-m", "muonlab.cli", "study", "run"],
            cwd=repository.root, env=repository.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        seen: list[str] = []
        deadline = time.monotonic() + 300
        while watch.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                seen += [page] if (page := partial.read_text()) not in seen else []
            time.sleep(0.2)
        runner.wait()
        if watch.poll() is None:
            watch.kill()
        out, err = watch.communicate()
        err = waiting + err
    return Followed(repository, seen, subprocess.CompletedProcess(command, watch.returncode, out, err))


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_watch_ends_with_its_study_and_names_the_report(followed: Followed) -> None:
    assert followed.watch.returncode == 0, followed.watch.stderr
    assert followed.watch.stdout == f"{REPORTS / 'report.html'}\n"
    assert "4 of 4 runs ended" in followed.watch.stderr.splitlines()[-1]
    assert not (followed.repository.root / REPORTS / "partial.html").exists()


def test_a_partial_report_says_so_and_gives_no_verdict(followed: Followed) -> None:
    assert followed.partials
    for page in followed.partials:
        assert "This report is partial" in page
        assert not [word for word in VERDICTS if word in page]
    # Whoever commits everything while a study runs does not commit it.
    followed.repository.git("check-ignore", str(REPORTS / "partial.html"))


def test_the_run_beside_a_watch_is_the_run_without_one(followed: Followed) -> None:
    attempts = followed.repository.attempts()
    assert sorted((r["arm"], r["seed"], r["status"]) for r in attempts) == [
        (arm, seed, "completed") for arm in ("muon", "nolah") for seed in (0, 1)
    ]
    assert len(followed.repository.ledger()) == 4


def test_of_a_whole_study_it_writes_the_studys_own_bytes_and_tells_verdict_and_effects(
    followed: Followed, tmp_path: Path
) -> None:
    repository, folder = followed.repository, followed.repository.root / REPORTS
    browser, log = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" > {log}\n')
    browser.chmod(0o755)
    before = hashes(folder)
    told = json.loads(repository.muon("report", STUDY, "--json", "--open", BROWSER=str(browser)).stdout)
    assert hashes(folder) == before
    effects = told.pop("effects")
    assert told == repository.read(f"{REPORTS}/verdict.json")
    estimates = repository.read(f"{REPORTS}/stats.json")["comparisons"][0]["estimates"]
    assert effects == {"nolah": {"role": "challenger", **estimates}}
    assert log.read_text().strip() == (folder / "report.html").as_uri()


@pytest.fixture
def prepared_only(make: Maker, tmp_path: Path) -> Repository:
    """A repository whose cells can be named and of which none has run."""
    repository = make(tmp_path / "repository")
    layout = Layout(root=repository.root, main=repository.root)
    write_fingerprints(layout, load_params(layout.params))
    return repository


def test_of_an_incomplete_study_it_reports_what_is_missing(prepared_only: Repository) -> None:
    done = prepared_only.muon("report", check=False)
    assert (done.returncode, done.stdout) == (3, f"{REPORTS / 'report.html'}\n")
    assert prepared_only.read(f"{REPORTS}/verdict.json")["verdicts"]["nolah"]["verdict"] == "INCOMPLETE"


def test_a_watch_names_what_trains_and_leaves_scratch_alone(prepared_only: Repository) -> None:
    """One attempt runs (this process holds it), one was killed: neither is touched, and the running one is named."""
    layout = Layout(root=prepared_only.root, main=prepared_only.root)
    cells = study_cells(layout, load_params(layout.params), load_study(layout, STUDY))
    # The number of the killed one was given again, here to this process, which began much later.
    for cell, began in ((cells[0], datetime.now(UTC).isoformat()), (cells[1], "2001-02-03T04:05:06+00:00")):
        attempt = layout.scratch / cell.digest / "attempts" / "1"
        attempt.mkdir(parents=True)
        (attempt.parents[1] / "lock").touch()
        (attempt / "start.json").write_text(json.dumps({"pid": os.getpid(), "record": {"started_at": began}}))
        progress = {"step": 3, "steps": 8, "loss": 5.5, "seconds": 1.0, "tokens": 192, "resumed_from_step": 0}
        (attempt / "progress.json").write_text(json.dumps(progress))
    before = hashes(layout.scratch)
    pages: list[str] = []
    said: list[str] = []

    def keep(path: Path) -> None:
        pages.append(path.read_text())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch_study(layout, STUDY, say=said.append, on_first=keep)
    assert said == [f"0 of 4 runs ended, training muon-0 at step 3 of 8, training loss 5.500: {REPORTS}/partial.html"]
    assert "training now: muon-0 at step 3 of 8" in pages[0]
    assert "training now: nolah-0" not in pages[0]
    assert "This report is partial" in pages[0]
    assert not [word for word in VERDICTS if word in pages[0]]
    assert hashes(layout.scratch) == before
    assert not (layout.reports(STUDY) / "partial.html").exists()


REFUSALS = {
    ("003-toy",): "muon: experiments: unknown study '003-toy'",
    ("900-tune",): "900-tune: nothing of it has been prepared or run here yet",
    ("900-tune", "--watch"): "kind is 'tuning', and only a comparison is followed with a partial report",
    ("--watch", "--json"): "a partial report has no verdict to print",
    (): "nothing of it has been prepared or run here yet",
}


def test_it_refuses_in_one_sentence(repository: Repository) -> None:
    folder = repository.root / "experiments" / "900-tune"
    folder.mkdir()
    study = {
        "slug": "900-tune", "question": "Which?", "kind": "tuning", "provenance": "run", "workload": "toy",
        "baseline": "muon", "challengers": ["nolah"], "seeds": [0], "grid": {"lr": [0.01, 0.02]},
        "price_usd_per_gpu_hour": 0, "budget_usd": 0,
    }  # fmt: skip
    (folder / "study.yaml").write_text(json.dumps({"study": study}))
    for arguments, sentence in REFUSALS.items():
        refused = repository.muon("report", *arguments, check=False)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert sentence in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
