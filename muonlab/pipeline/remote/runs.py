"""Run a study on a rented machine: send the commit, start it there, follow it, and bring home what it leaves.

    git push of the commit -> the agent sets up and runs `muon study run` in a process of its own -> its log is followed
    -> ledger, lock files and reports come back as a commit, weights and curves as objects of DVC's cache

The meter of a run starts with its set-up and stops at its end: seconds of the machine, whether it trains or not. What
a study's own records cost is counted by the study's price, as on any machine.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from muonlab.pipeline.answer import Answer
from muonlab.pipeline.gates import gate_states, refuse_closed
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.parts import chosen_cells
from muonlab.pipeline.processes import difference, git_state
from muonlab.pipeline.registered import read_registration
from muonlab.pipeline.remote.link import Link, UnreachableError
from muonlab.pipeline.remote.places import Remote
from muonlab.pipeline.remote.results import bring
from muonlab.pipeline.resolve import load_study
from muonlab.pipeline.sharing import shared_changes
from muonlab.pipeline.study_run import check
from muonlab.registry.errors import CellsFailedError, UsageError
from muonlab.reporting.wording import duration, listed

Say = Callable[[str], None]
METER_EVERY_S = 60.0
GIVE_UP_S = 900.0
"""Without a connection for so long, following ends; the run does not."""
LONGEST_WAIT_S = 30.0
TAIL_BYTES = 2000
"""Of the log of a run that is followed again."""
STOP_S = 120.0
"""For a run that is stopped to write its records and commit them."""
LEAST_GB, LEAST_FOR_SETUP_GB = 1.0, 10.0


class RemoteRun(Answer):
    """A run on a rented machine, as it ended."""

    remote: str
    run: str
    study: str
    commit: str
    """That was sent and run."""
    exit_code: int
    """Of `muon study run` there; 4 also where the machine's own price reached --max-cost, 130 where it was stopped, 3
    where what it trained is not committed."""
    why: str | None
    """The last sentence of a run that did not end with 0."""
    seconds: float
    """From the start of its set-up to its end."""
    cost_usd: float
    """Of those seconds at the machine's price."""
    price_usd_per_hour: float
    brought: list[str]
    """What came home, in sentences."""

    def lines(self) -> Iterator[str]:
        """How it ended, what it cost, and what came home."""
        why = "" if self.why is None else f": {self.why.rstrip('.')}"
        price = f", ${self.cost_usd:.2f} at ${self.price_usd_per_hour:.2f} an hour" if self.price_usd_per_hour else ""
        yield f"{self.run} on {self.remote} ended with {self.exit_code} after {duration(self.seconds)}{price}{why}."
        yield from self.brought


def run_there(layout: Layout, remote: Remote, slug: str, arguments: Sequence[str], *,
              only: Sequence[str], override: bool, max_cost_usd: float | None, say: Say) -> RemoteRun:  # fmt: skip
    """Run a study on `remote` to its end and bring home what it leaves; a run of the same that lives there is followed.

    `arguments` are those of `muon study run` there. Raises UsageError for what is refused before anything is sent, and
    CellsFailedError where the connection is lost for good; the run goes on then.
    """
    study = load_study(layout, slug)
    if study.kind == "tuning":
        raise UsageError(
            f"experiments/{slug}: a tuning study writes what it chose into params.yaml, which is declared here and not "
            "there; run it in a shell on the machine, or here."
        )
    if study.provenance == "reported":
        raise UsageError(f"experiments/{slug}: its results were reported by others, so that nothing of it is run.")
    chosen_cells(study, only)
    if max_cost_usd is not None and not remote.price_usd_per_hour:
        raise UsageError(
            f"--max-cost: no price is known of {remote.name}, so that its hours cannot be held against "
            f"${max_cost_usd:.2f}; tell it by `muon remote add {remote.name} {remote.user}@{remote.host} "
            "--price-per-hour DOLLARS`."
        )
    check(layout, slug)
    if not override and read_registration(layout, slug) is None:
        refuse_closed(study, gate_states(layout, study), None, override=False)
    commit = _clean_commit(layout, study.twin_of or slug)
    link = Link(layout, remote)
    _refuse_unfit(link)
    there = link.ask("prepare")["repository"]
    link.git("push", "--quiet", "--no-verify", "URL", f"{commit}:refs/muonlab/sent/{commit}", path=there)
    answer = link.ask(
        "start", study=slug, commit=commit, arguments=list(arguments), max_cost_usd=max_cost_usd,
        price_usd_per_hour=remote.price_usd_per_hour, **_author(layout),
    )  # fmt: skip
    if (state := answer.get("started")) is None:
        state = answer["there_is"]
        if not answer["same"]:
            raise UsageError(
                f"{remote.name}: {state['run']} is running there, of commit {state['commit'][:12]} with "
                f"{' '.join(state['arguments']) or 'no options'}, and one run at a time has the machine; `muon remote "
                f"follow {remote.name}` follows it, `muon remote stop {remote.name}` ends it."
            )
        say(f"{remote.name}: {state['run']} is this run already; it is followed, and no second one is started.")
    else:
        say(f"{remote.name}: {state['run']} started, of commit {commit[:12]}; its meter runs.")
    return _to_its_end(link, state, say)


def follow_run(layout: Layout, remote: Remote, run: str | None, *, say: Say) -> RemoteRun:
    """Follow a run, the last one by default, to its end and bring home what it leaves."""
    link = Link(layout, remote)
    states = [s for s in link.ask("runs")["runs"] if run in (None, s["run"])]
    if not states:
        found = "no run was started there yet" if run is None else f"there is no run {run!r}"
        raise UsageError(f"{remote.name}: {found}; `muon study run STUDY --on {remote.name}` starts one.")
    return _to_its_end(link, states[-1], say)


def stop_run(layout: Layout, remote: Remote) -> str:
    """End the run that lives on a machine, and only its processes; say what was spent."""
    answer = Link(layout, remote).ask("stop", run=None, patience_s=STOP_S)
    state = answer["stopped"]
    used = answer["in_use_seconds"]
    paid = (
        f"The machine has been in use for {duration(used)}, {remote.spent(used)}, and is paid for until you end it at "
        "its provider."
    )
    spent = f"{duration(state['seconds'])} since its set-up began, {remote.spent(state['seconds'])}"
    if not answer["lived"]:
        uncommitted = f" {left_there(remote, state)}" if state["uncommitted"] else ""
        return f"{remote.name}: nothing runs there; the last run, {state['run']}, took {spent}.{uncommitted} {paid}"
    left = state["results"] or state["uncommitted"]
    results = f" `muon remote follow {remote.name}` brings home what it has done." if left else ""
    return f"{remote.name}: {state['run']} was stopped after {spent}.{results} {paid}"


def _to_its_end(link: Link, state: dict[str, Any], say: Say) -> RemoteRun:
    state = _follow(link, state, say)
    remote = link.remote
    if state["uncommitted"]:
        with contextlib.suppress(UnreachableError):  # then it stays as it is, which is said
            state = link.ask("settle", run=state["run"])["state"]
    code = state["code"]
    if state["uncommitted"]:
        # A run that trained to its end and did not come home has not succeeded.
        code = code or CellsFailedError.exit_code
        brought = [left_there(remote, state)]
    else:
        brought = ["It has left nothing that is not here."]
        if state["results"]:
            brought = bring(link, state["study"], run=state["run"])
        with contextlib.suppress(UnreachableError):  # then it comes once more, and finds itself here
            link.ask("brought", run=state["run"])
    return RemoteRun(
        remote=remote.name,
        run=state["run"],
        study=state["study"],
        commit=state["commit"],
        exit_code=CellsFailedError.exit_code if code is None else code,
        why=state["why"],
        seconds=state["seconds"],
        cost_usd=state["seconds"] / 3600 * state["price_usd_per_hour"],
        price_usd_per_hour=state["price_usd_per_hour"],
        brought=brought,
    )


def _follow(link: Link, state: dict[str, Any], say: Say) -> dict[str, Any]:
    """Say a run's log as it grows, and its meter; return where it stood at its end."""
    name, offset = link.remote.name, max(0, state["log_bytes"] - TAIL_BYTES)
    heard, told, wait_s = time.monotonic(), 0.0, 1.0
    in_mid_line = offset > 0
    while True:
        try:
            for answer in link.answers("follow", run=state["run"], offset=offset):
                heard, wait_s = time.monotonic(), 1.0
                if "log" in answer:
                    offset = answer["offset"]
                    text = answer["log"].rstrip("\n")
                    say(text.partition("\n")[2] if in_mid_line else text)
                    in_mid_line = False
                elif not answer["state"]["lives"]:
                    found: dict[str, Any] = answer["state"]
                    return found
                elif time.monotonic() - told > METER_EVERY_S:
                    told = time.monotonic()
                    say(f"{name}: {meter(link.remote, answer['state'])}")
        except UnreachableError as error:
            if time.monotonic() - heard > GIVE_UP_S:
                raise CellsFailedError(
                    f"{error} The run goes on there; `muon remote follow {name}` finds it again."
                ) from None
            say(f"{error} The run goes on there; asking again in {wait_s:.0f} s.")
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def meter(remote: Remote, state: dict[str, Any]) -> str:
    """Where a run stands and what the machine has cost since its set-up began, in words."""
    return (
        f"{state['run']}, {state['phase']}, {duration(state['seconds'])} since its set-up began, "
        f"{remote.spent(state['seconds'])}"
    )


def left_there(remote: Remote, state: dict[str, Any]) -> str:
    """What to do about a run that could not commit what it has trained, and why it could not."""
    return (
        f"What it trained lies there uncommitted ({state['uncommitted'].rstrip('.')}); give the same command again, or "
        f"`muon remote follow {remote.name}`, before you end the machine."
    )


def _refuse_unfit(link: Link) -> None:
    found, its = link.ask("hello"), link.remote
    least = LEAST_GB if its.prepared or found["set_up"] else LEAST_FOR_SETUP_GB
    if found["free_gb"] < least:
        raise UsageError(
            f"{its.name}: {found['free_gb']:.2g} GB are free at {found['folder']} and {least:.0f} GB are needed; free "
            "space there, or name another place by `muon remote add ... --folder`."
        )


def _clean_commit(layout: Layout, slug: str) -> str:
    """The commit that is sent. Raises UsageError where the tree holds anything that it lacks and the run would miss."""
    found = difference(layout.root)
    files = [*found.files, *found.untracked, *_untracked_declaration(layout, slug)]
    commit = git_state(layout.root)[0]
    if commit is None:
        raise UsageError(f"{layout.root}: no git repository with a commit, and a commit is what is sent; `git init`.")
    if files:
        _refuse_dirty(files, "`git commit` first")
    if results := shared_changes(layout):
        _refuse_dirty(results, 'what comes back is merged with it: `muon commit "..."` first')
    return commit


def _untracked_declaration(layout: Layout, slug: str) -> list[str]:
    asked = subprocess.run(
        ["git", "ls-files", "--others", "-z", "--", "params.yaml", "experiments/*/study.yaml"],
        cwd=layout.root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [path for path in asked.stdout.split("\0") if path in ("params.yaml", f"experiments/{slug}/study.yaml")]


def _refuse_dirty(files: list[str], what_to_do: str) -> NoReturn:
    named = listed([*files[:3], *([f"{len(files) - 3} more"] if len(files) > 3 else [])])
    verb = "is" if len(files) == 1 else "are"
    raise UsageError(f"--on: {named} {verb} not as committed, and what is sent is the last commit; {what_to_do}.")


def _author(layout: Layout) -> dict[str, str]:
    """In whose name results are committed there."""
    author = {}
    for key in ("name", "email"):
        asked = subprocess.run(
            ["git", "config", f"user.{key}"], cwd=layout.main, capture_output=True, text=True, check=False
        )
        if not (value := asked.stdout.strip()):
            raise UsageError(f"git: user.{key} is not set, and results come back as a commit; `muon doctor --fix`.")
        author[key] = value
    return author
