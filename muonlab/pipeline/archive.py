"""Archive an arm on the verdict of a study: what a NO_GO or EQUIVALENT is for.

The verdict is made anew from the evidence there is now and must be the one of the study's last report. It is kept in
experiments/archived.json, which `muon commit` takes: from then on a study that uses the arm asks for --override, and
one that requires the archiving may start. `git revert` of that commit deletes the entry and takes it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from pydantic import TypeAdapter

from muonlab.pipeline.answer import Answer
from muonlab.pipeline.collect import collect
from muonlab.pipeline.conclude import read_evaluations
from muonlab.pipeline.gates import ARCHIVE, ARCHIVING, Archived, archived_arm_states, gate_states, read_archive
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.processes import git_state
from muonlab.pipeline.resolve import declared_slugs, load_study
from muonlab.registry.errors import MuonlabError, UsageError, unknown_name
from muonlab.registry.files import write_atomically
from muonlab.registry.study import Study
from muonlab.reporting.index import JudgedStudy, read_judged
from muonlab.reporting.standing import judge
from muonlab.reporting.wording import listed


class ArchiveAnswer(Answer):
    """What was archived, and what follows from it."""

    arm: str
    study: str
    verdict: str
    """NO_GO or EQUIVALENT."""
    decided_at: str
    """UTC, ISO 8601."""
    new: bool
    """False where it was archived before, and nothing was written."""
    file: str
    """Path of the archive in the repository."""
    next_method: str | None
    """The study's `on_archive`."""
    unlocked: list[str]
    """Studies that required this archiving and have all their gates open now."""
    waiting: dict[str, list[str]]
    """Other studies that required it -> what they still ask for."""
    closed: list[str]
    """Studies that use the arm and are not registered: they start with --override only."""

    def lines(self) -> Iterator[str]:
        """What was done, and what to do next."""
        since = "" if self.new else f" since {self.decided_at}; nothing was changed"
        yield f"{self.arm}: archived as {self.verdict} by {self.study}{since}."
        if self.new:
            yield (
                f"{self.file} holds it, and `muon commit` commits it; without its entry there (`git revert`, or an "
                "editor) it is not archived."
            )
        if self.next_method:
            yield f"The declared next method is {self.next_method}."
        for slug in self.unlocked:
            yield f"Unlocked: {slug} (`muon study plan {slug}`)."
        if self.closed:
            yield f"Asking for --override from now on, since they use {self.arm}: {listed(self.closed)}."
        for slug, asked in self.waiting.items():
            yield f"Not yet unlocked: {slug}, which {listed(asked)}."


def archive_arm(layout: Layout, arm: str, slug: str) -> ArchiveAnswer:
    """Archive an arm on the verdict of the study `slug`.

    Raises UsageError unless the evidence there is now, and the last report, have it NO_GO or EQUIVALENT in a complete
    study that was run here.
    """
    study = load_study(layout, slug)
    _refuse_kind(study)
    if arm not in study.challengers:
        raise unknown_name(f"experiments/{slug}", "challenger", arm, study.challengers)
    judged = read_judged(layout.reports(slug))
    if judged is None:
        raise UsageError(
            f"experiments/{slug}: it has no report, and an arm is archived on one; `muon study run {slug}` makes it."
        )
    standing = judge(collect(layout, slug), read_evaluations(layout, slug))
    verdict = next(c.decision.verdict.value for c in standing.decided if c.arm == arm and c.decision is not None)
    _refuse_verdict(judged, arm, verdict, complete=standing.complete)
    snapshot = standing.snapshot
    entry = Archived(
        arm=arm,
        study=slug,
        verdict=verdict,
        registration=snapshot.registration.registration if snapshot.registration else None,
        decided_at=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=git_state(layout.main)[0],
        ledger_sha256=snapshot.ledger_sha256,
    )
    held = read_archive(layout)
    before = next((its for its in held if (its.arm, its.study) == (arm, slug)), None)
    new = before is None or (before.verdict, before.registration) != (entry.verdict, entry.registration)
    if new:
        kept = [its for its in held if its is not before]
        text = TypeAdapter(list[Archived]).dump_json([*kept, entry], indent=2).decode()
        write_atomically(layout.main / ARCHIVE, text + "\n")
    unlocked, waiting, closed = _follows(layout, arm, slug)
    return ArchiveAnswer(
        arm=arm,
        study=slug,
        verdict=verdict,
        decided_at=entry.decided_at if new or before is None else before.decided_at,
        new=new,
        file=ARCHIVE,
        next_method=study.on_archive,
        unlocked=unlocked,
        waiting=waiting,
        closed=closed,
    )


def _refuse_kind(study: Study) -> None:
    where = f"experiments/{study.slug}"
    if study.twin_of is not None:
        raise UsageError(f"{where}: it is a rehearsal of {study.twin_of} and decides nothing; archive on that study.")
    if study.provenance == "reported":
        raise UsageError(
            f"{where}: its results were reported by others and decide nothing; declare a study of provenance run."
        )
    if study.kind == "tuning":
        raise UsageError(f"{where}: it is a tuning study, which has no verdict; name a comparison.")


def _refuse_verdict(judged: JudgedStudy, arm: str, verdict: str, *, complete: bool) -> None:
    """Raise UsageError unless the last report and the evidence there is now agree on a verdict that archives."""
    slug = judged.study
    again = f"`muon study run {slug}`"
    said = judged.summary.challengers.get(arm)
    if said is not None and said.verdict == verdict and judged.summary.complete != complete:
        now = "complete" if complete else "incomplete"
        was = "complete" if judged.summary.complete else "incomplete"
        raise UsageError(
            f"reports/{slug}/verdict.json: it has the study {was}, and by the evidence there is now it is {now}; "
            f"{again} first, since no arm is archived on a part."
        )
    if said is None or said.verdict != verdict:
        raise UsageError(
            f"reports/{slug}/verdict.json: it has {arm} {said.verdict if said else 'without a verdict'}, and the "
            f"evidence there is now makes it {verdict}; {again} makes the report anew."
        )
    if not complete:
        raise UsageError(f"experiments/{slug}: it is not complete, and no arm is archived on a part; {again} first.")
    if verdict not in ARCHIVING:
        raise UsageError(
            f"experiments/{slug}: {arm} is {verdict}, and only NO_GO or EQUIVALENT archives an arm; "
            f"`muon next {slug}` says what would decide."
        )


def _follows(layout: Layout, arm: str, slug: str) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """What the archiving opens and closes.

    The studies that required it, those with every gate open and what the others still ask for; and those that use the
    arm without having been registered with it.
    """
    unlocked: list[str] = []
    waiting: dict[str, list[str]] = {}
    closed: list[str] = []
    for name in declared_slugs(layout):
        try:
            study = load_study(layout, name)
        except MuonlabError:
            continue  # `muon study list` says what is wrong with it
        if arm in study.arms and archived_arm_states(layout, study):
            closed.append(name)
        asked = [r for r in study.requires if r.verdict == "ARCHIVED" and r.study == slug and r.arm in (None, arm)]
        if not asked:
            continue
        asks = [gate.sentence for gate in gate_states(layout, study) if not gate.is_open]
        if asks:
            waiting[name] = asks
        else:
            unlocked.append(name)
    return unlocked, waiting, closed
