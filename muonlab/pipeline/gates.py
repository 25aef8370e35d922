"""What a study asks for before it may start: the outcome of other studies, and that none of its arms is archived.

    open    the required study's last report (reports/<study>/verdict.json) is complete and says what is asked for:
            GO, NO_GO or EQUIVALENT on the arm (on any challenger where none is named), or that the study has passed
    open    ARCHIVED: experiments/archived.json holds the arm for that study, and the report still bears it out
    closed  anything else, and every arm of the study that is archived, whoever archived it

A gate is asked where a study is registered, which its first run does: a study that is registered has passed its gates,
or its registration holds an override, and it is not asked again. A declaration that was changed since is: about all
gates while there are no results, and about the archived arms that it adds always; not about those that were overridden.
A twin pays and decides nothing, and has no gate; nor has what others report. Gates compare files of the repository:
they protect from mistakes and haste, not from who edits a report, which its readers would see. See
docs/adr/0009-gates-and-archive.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from muonlab.pipeline.answer import Facts
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.registered import read_registration
from muonlab.registry.errors import IntegrityError, UsageError, unknown_name
from muonlab.registry.settings import Closed, Name
from muonlab.registry.snapshot import GateState, Override
from muonlab.registry.study import Requirement, Study

if TYPE_CHECKING:
    from muonlab.reporting.index import JudgedStudy

ARCHIVE = "experiments/archived.json"
ARCHIVING = ("NO_GO", "EQUIVALENT")
"""The verdicts that archive an arm."""


class Archived(Closed):
    """An arm that is archived: on whose verdict, and from what evidence."""

    arm: Name
    study: Name
    verdict: str
    """NO_GO or EQUIVALENT."""
    registration: str | None
    """Of the deciding study."""
    decided_at: str
    """UTC, ISO 8601."""
    commit: str | None
    ledger_sha256: str


class Gate(Facts):
    """One thing that a study asks for before it may start."""

    asks: str
    """In words."""
    found: str
    """How it stands now, in words."""
    is_open: bool

    def lines(self) -> Iterator[str]:
        """One line."""
        yield f"Gate {'open' if self.is_open else 'closed'}: asks for {self.asks}; found: {self.found}."


def read_archive(layout: Layout) -> list[Archived]:
    """The archived arms, oldest first. Raises IntegrityError on a file that is no such list."""
    path = layout.main / ARCHIVE
    if not path.exists():
        return []
    try:
        return TypeAdapter(list[Archived]).validate_json(path.read_text(encoding="utf-8"))
    except ValidationError:
        raise IntegrityError(
            f"{ARCHIVE}: it is no list of archived arms, so it was edited; take it back from git."
        ) from None


def refuse_unfit(study: Study, declared: Sequence[str], read: Callable[[str], Study]) -> None:
    """Raise UsageError where a study asks for what no study can come to.

    declared: the studies that have a study.yaml; read: slug -> what it says.
    """
    where = f"experiments/{study.slug}/study.yaml"
    if study.passes is not None and study.kind == "tuning":
        raise UsageError(f"{where}: study.passes: a tuning study has no pairs to judge; remove it.")
    if study.passes is not None and study.passes.control_worse and not study.control:
        raise UsageError(f"{where}: study.passes: control_worse is given and control is empty; name a control arm.")
    for required in study.requires:
        _refuse_requirement(f"{where}: study.requires", study, required, declared, read)
    if circle := _circle(study, read):
        raise UsageError(f"{where}: study.requires: a circle, of which none can start: {' -> '.join(circle)}.")


def _refuse_requirement(
    where: str, study: Study, required: Requirement, declared: Sequence[str], read: Callable[[str], Study]
) -> None:
    if required.study == study.slug:
        raise UsageError(f"{where}: {study.slug} requires itself; name a study that comes before it.")
    if required.study not in declared:
        raise unknown_name(where, "study", required.study, [slug for slug in declared if slug != study.slug])
    other = read(required.study)
    if other.kind == "tuning" or other.provenance == "reported":
        what = "a tuning study" if other.kind == "tuning" else "one of results that others report"
        raise UsageError(
            f"{where}: {other.slug} is {what}, which comes to no verdict that opens a gate; require a comparison that "
            "is run here."
        )
    if required.verdict == "PASSED":
        if other.passes is None:
            raise UsageError(f"{where}: PASSED is asked of {other.slug}, which declares no `passes`; declare it there.")
        if required.arm is not None:
            raise UsageError(f"{where}: PASSED is about {other.slug} as a whole; remove arm: {required.arm}.")
    if required.arm is not None and required.arm not in other.challengers:
        raise unknown_name(f"{where}: {other.slug}", "challenger", required.arm, other.challengers)


def _circle(study: Study, read: Callable[[str], Study]) -> list[str]:
    """The first circle among what a study requires, directly or not, its first member named again; empty: none."""
    done: set[str] = set()

    def follow(one: Study, path: list[str]) -> list[str]:
        for required in one.requires:
            if required.study in path:
                return [*path[path.index(required.study) :], required.study]
            if required.study not in done and (found := follow(read(required.study), [*path, required.study])):
                return found
        done.add(one.slug)
        return []

    return follow(study, [study.slug])


def gate_states(layout: Layout, study: Study) -> list[GateState]:
    """What a study asks for and how it stands now: what it requires, and `archived_arm_states`."""
    if study.twin_of is not None or study.provenance == "reported":
        return []
    archive = read_archive(layout)
    return [*(_state(layout, required, archive) for required in study.requires), *archived_arm_states(layout, study)]


def archived_arm_states(layout: Layout, study: Study) -> list[GateState]:
    """A closed gate for every archived arm of a study that is none of the arms it was registered with."""
    if study.twin_of is not None or study.provenance == "reported":
        return []
    held = read_registration(layout, study.slug)
    registered = held.arms if held is not None and held.is_whole else []
    return [
        GateState(
            asks=f"{its.arm} not to be archived",
            found=f"it was archived as {its.verdict} by {its.study}",
            is_open=False,
        )
        for its in read_archive(layout)
        if its.arm in study.arms and its.arm not in registered
    ]


def gates_of(layout: Layout, study: Study) -> list[Gate]:
    """The same for an answer."""
    return [Gate(**state.model_dump()) for state in gate_states(layout, study)]


def _state(layout: Layout, required: Requirement, archive: Iterable[Archived]) -> GateState:
    from muonlab.reporting.index import read_judged

    asks = asked_for(required)
    try:
        judged = read_judged(layout.main / "reports" / required.study)
    except UsageError as error:
        return GateState(asks=asks, found=f"no report that can be read ({str(error).rstrip('.')})", is_open=False)
    if judged is None:
        return GateState(asks=asks, found="no report of it yet", is_open=False)
    if required.verdict == "PASSED":
        is_open, found = _has_passed(judged)
    elif required.verdict == "ARCHIVED":
        is_open, found = _is_archived(judged, required, archive)
    else:
        verdicts = _verdicts(judged, required)
        is_open, found = required.verdict in verdicts.values(), _spell(verdicts)
    if not judged.summary.complete:
        return GateState(asks=asks, found=f"{found}, in a report that is partial", is_open=False)
    return GateState(asks=asks, found=f"{found}{', its plan amended' if judged.amended else ''}", is_open=is_open)


def asked_for(required: Requirement) -> str:
    """A requirement in words."""
    match required.verdict:
        case "PASSED":
            return f"{required.study} to have passed"
        case "ARCHIVED":
            return f"{required.arm or 'a challenger'} to be archived by {required.study}"
    return f"{required.verdict} on {required.arm or 'a challenger'} of {required.study}"


def _verdicts(judged: JudgedStudy, required: Requirement) -> dict[str, str]:
    of = judged.summary.challengers
    return {arm: its.verdict for arm, its in of.items() if required.arm in (None, arm)}


def _spell(verdicts: dict[str, str]) -> str:
    return ", ".join(f"{arm} {verdict}" for arm, verdict in verdicts.items()) or "no verdict on it"


def _has_passed(judged: JudgedStudy) -> tuple[bool, str]:
    if judged.passed is None:
        return False, "a report that judges no pass criterion"
    reasons = "" if judged.passed.verdict else f" ({'; '.join(judged.passed.reasons)})"
    return judged.passed.verdict is True, f"{judged.passed.word}{reasons}"


def _is_archived(judged: JudgedStudy, required: Requirement, archive: Iterable[Archived]) -> tuple[bool, str]:
    verdicts = _verdicts(judged, required)
    entries = [its for its in archive if its.study == required.study and its.arm in verdicts]
    if not entries:
        return False, f"not archived, {_spell(verdicts)}"
    # No verdict is latched: more pairs may have changed it.
    held = [its for its in entries if verdicts[its.arm] in ARCHIVING]
    return bool(held), ", ".join(
        f"{its.arm} archived as {its.verdict}, now {verdicts[its.arm]}" for its in held or entries
    )


def refuse_closed(
    study: Study, states: Iterable[GateState], commit: str | None, *, override: bool, given: Iterable[Override] = ()
) -> list[Override]:
    """The override to record where one of these gates is closed and overridden; nothing where every one is open.

    A gate that one of the overrides `given` before was for is not asked again. Raises UsageError at a closed gate
    without `override`, naming all of them.
    """
    known = [sentence for its in given for sentence in its.gates]
    closed = [
        gate
        for gate in states
        if not gate.is_open and not any(sentence.startswith(f"{gate.asking};") for sentence in known)
    ]
    if not closed:
        return []
    if override:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return [Override(at=now, commit=commit, gates=[gate.sentence for gate in closed])]
    asked = {gate.asks for gate in closed}
    first = next((its for its in study.requires if asked_for(its) in asked), None)
    raise UsageError(
        f"experiments/{study.slug}: it {', and '.join(gate.sentence for gate in closed)}; {_how_to_open(first)}start "
        f"it all the same with `muon study run {study.slug} --override`, which its report then shows."
    )


def _how_to_open(required: Requirement | None) -> str:
    if required is None:
        return ""
    archive = f" and, on its verdict, `muon archive {required.arm or 'ARM'} --study {required.study}`"
    return f"`muon study run {required.study}` first{archive if required.verdict == 'ARCHIVED' else ''}, or "
