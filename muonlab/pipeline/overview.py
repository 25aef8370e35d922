"""What the command line prints of studies: the list, the state of the cells, and how a run ended."""

from __future__ import annotations

from collections.abc import Iterator

import click

from muonlab.pipeline.collect import collect
from muonlab.pipeline.conclude import read_evaluations, verdict_sentence
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.progress import duration
from muonlab.pipeline.resolve import load_study
from muonlab.pipeline.study_run import RunOutcome
from muonlab.registry.errors import MuonlabError
from muonlab.reporting.standing import Standing, exit_code, judge
from muonlab.reporting.wording import family_text


def study_rows(layout: Layout) -> Iterator[str]:
    """One line a study: slug, kind, arms, seeds, and the decision of its last report."""
    for path in sorted((layout.root / "experiments").glob("*/study.yaml")):
        slug = path.parent.name
        try:
            study = load_study(layout, slug)
        except MuonlabError as error:
            yield f"{slug}: cannot be read: {error}"
            continue
        yield f"{slug}  {study.kind}, {len(study.arms)} arms x {len(study.seeds)} seeds on {study.workload}"
        yield f"    {verdict_sentence(layout, slug) or study.question}"


def say_outcome(layout: Layout, slug: str, outcome: RunOutcome) -> None:
    """Print how a run of a study ended: work done on stderr, verdict and report's path on stdout."""
    for key, reason in outcome.failed.items():
        click.echo(f"failed: {key}: {reason}", err=True)
    if outcome.trained == 0 and not outcome.failed:
        done = f"nothing to train: all {outcome.restored} cells are in place"
    else:
        done = f"trained {outcome.trained} cells, {outcome.restored} in place or restored, {len(outcome.failed)} failed"
    spent = f", ${outcome.standing.total_cost_usd:.2f} in all" if outcome.standing.total_cost_usd else ""
    click.echo(f"{slug}: {done} ({duration(outcome.seconds)}{spent}).", err=True)
    say_doubts(outcome.standing)
    for comparison in outcome.standing.decided:
        assert comparison.decision is not None
        click.echo(f"{comparison.arm}: {comparison.decision.verdict.value}")
    click.echo(verdict_sentence(layout, slug))
    click.echo(f"report: reports/{slug}/report.md")


def say_doubts(standing: Standing) -> None:
    """Print on stderr what the verdicts must be read with: the amendments, and arms that were run beside the study."""
    for reason in standing.snapshot.amendments:
        click.echo(f"muon: plan amended: {reason}.", err=True)
    if standing.tried or standing.undeclared:
        click.echo(f"muon: {family_text(standing)}.", err=True)


def say_status(layout: Layout, slug: str) -> int:
    """Print every cell of a study's grid as the evidence has it now, and its verdicts; return the exit code."""
    snapshot = collect(layout, slug)
    outcomes = {r.cell_digest: r for r in reversed(snapshot.records)}
    outcomes |= {r.cell_digest: r for r in reversed(snapshot.records) if r.is_result}
    for cell in snapshot.cells:
        record = outcomes.get(cell.digest)
        state = record.status if record else "missing"
        loss = f"{record.val_loss:.4f}" if record and record.val_loss is not None else "-"
        spent = f"{record.wall_seconds:7.1f} s  ${record.cost_usd:.2f}" if record else ""
        click.echo(f"{cell.arm}-{cell.seed}".ljust(20) + f"{state:<10} {loss:>8} {spent}  {cell.digest[:12]}")
    for sentence in [*snapshot.findings, *snapshot.notes]:
        click.echo(f"muon: {sentence}", err=True)
    if snapshot.study.kind == "comparison":
        standing = judge(snapshot, read_evaluations(layout, slug))
        say_doubts(standing)
        for comparison in standing.decided:
            assert comparison.decision is not None
            click.echo(f"{comparison.arm}: {comparison.decision.verdict.value}: {comparison.decision.reasons[0]}")
        return exit_code(standing)
    return 0 if all(c.digest in outcomes for c in snapshot.cells) else 3
