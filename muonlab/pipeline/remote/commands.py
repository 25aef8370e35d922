"""`muon` commands that look at another machine: doctor, status and logs, answered by the tree that runs there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from muonlab.pipeline.doctor import Check, Doctor, State
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.remote.link import Link
from muonlab.pipeline.remote.places import Remote, fingerprint
from muonlab.pipeline.remote.runs import LEAST_FOR_SETUP_GB, LEAST_GB, left_there, meter
from muonlab.reporting.wording import duration

Say = Callable[[str], None]


def muon_there(layout: Layout, remote: Remote, arguments: Sequence[str], *, say: Say, warn: Say) -> int:
    """Run a `muon` command in the tree there, passing on what it prints; return its exit code.

    Raises UsageError where nothing is set up there yet.
    """
    code = 1
    for answer in Link(layout, remote).answers("muon", arguments=list(arguments)):
        if "out" in answer:
            say(answer["out"].rstrip("\n"))
        elif "err" in answer:
            warn(answer["err"].rstrip("\n"))
        else:
            code = answer["code"]
    return code


def say_meter(layout: Layout, remote: Remote, *, say: Say) -> bool:
    """Say what a machine is at and what it has cost, idle hours too; return whether muonlab is set up there."""
    found = Link(layout, remote).ask("hello")
    last, used = found["last_run"], found["in_use_seconds"]
    if last is None:
        say(f"{remote.name}: no run was started there yet; its meter starts with the first one's set-up.")
    elif last["lives"]:
        say(f"{remote.name}: {meter(remote, last)}")
    else:
        ended = "ended without a word" if last["code"] is None else f"ended with {last['code']}"
        home = "" if last["brought"] or not last["results"] else ", its results not yet brought home"
        say(f"{remote.name}: nothing runs; {last['run']} {ended} after {duration(last['seconds'])}{home}")
        if last["uncommitted"]:
            say(f"{remote.name}: {left_there(remote, last)}")
    if used is not None:
        say(f"{remote.name}: in use for {duration(used)}, {remote.spent(used)}, idle hours too")
    return bool(found["set_up"])


def doctor_there(layout: Layout, remote: Remote) -> Doctor:
    """What a machine has and lacks, and, where muonlab is set up there, what its own `muon doctor` finds."""
    link = Link(layout, remote)
    found = link.ask("hello")
    key = fingerprint(remote.host_key)
    checks = [
        Check(name="ssh", state="ok", found=f"{remote.address} answers and shows the pinned key {key}"),
        Check(name="python there", state="ok", found=found["python"]),
        _tool("git", found["git"], needed=True),
        _tool("make", found["make"], needed=not remote.prepared),
        Check(name="gpu there", state="ok", found=found["gpu"] or f"none, {found['cores']} cores"),
        _disk(remote, found["free_gb"], found["folder"], set_up=found["set_up"]),
    ]
    seconds = None
    if found["set_up"]:
        said: list[str] = []
        words: list[str] = []
        muon_there(layout, remote, ["doctor", "--json"], say=said.append, warn=words.append)
        try:
            theirs = Doctor.model_validate_json("\n".join(said))
        except ValueError:
            told = words[-1] if words else "it said nothing"
            checks.append(Check(name="muon doctor", state="problem", found=f"cannot run there ({told})"))
        else:
            checks += theirs.checks
            seconds = theirs.seconds_per_step
    else:
        checks.append(Check(name="set-up", state="note", found="not made yet; the first `muon study run --on` does it"))
    usable = all(check.state != "problem" for check in checks)
    return Doctor(checks=checks, usable=usable, seconds_per_step=seconds, exit_code=0 if usable else 1)


def _tool(name: str, found: str | None, *, needed: bool) -> Check:
    if found is None:
        state: State = "problem" if needed else "ok"
        lack = "not installed" if needed else "not installed, and not needed with a Python that is prepared"
        return Check(name=f"{name} there", state=state, found=lack)
    return Check(name=f"{name} there", state="ok", found=found)


def _disk(remote: Remote, free_gb: float, folder: str, *, set_up: bool) -> Check:
    least = LEAST_GB if remote.prepared or set_up else LEAST_FOR_SETUP_GB
    state: State = "problem" if free_gb < least else "ok"
    return Check(name="disk there", state=state, found=f"{free_gb:.3g} GB free at {folder}, {least:.0f} GB needed")
