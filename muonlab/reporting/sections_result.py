"""The report's sections on the result: paired differences, comparisons, reasons, evidence and curves."""

from __future__ import annotations

from collections.abc import Sequence

from muonlab.registry.verdict import Verdict
from muonlab.reporting.blocks import Block, Bullets, Kind, Paragraph, Pictures, Table, one_line, shortened
from muonlab.reporting.standing import ArmComparison, Standing
from muonlab.reporting.wording import (
    ABSENT,
    bracket,
    broken_guardrails,
    count,
    half_width,
    listed,
    loss_digits,
    margin_text,
    plain,
    same_seed,
    signed,
    worst_pair,
)


def pictures_of(drawn: Sequence[str], *names: str) -> tuple[Block, ...]:
    """Those of the figures that could be drawn, as one block; nothing where none could."""
    found = tuple(name for name in names if name in drawn)
    return (Pictures(found),) if found else ()


def differences(standing: Standing, drawn: Sequence[str]) -> tuple[Block, ...]:
    """The forest plot, or why there is none."""
    pictures = pictures_of(drawn, "forest")
    if not pictures:
        baseline = standing.snapshot.study.baseline
        return (Paragraph(f"No seed is finished in both {baseline} and another arm: there is no pair to show."),)
    text = (
        "Small marks: one pair of runs each (a cross: one of the two diverged). Diamond and bar: their mean and its "
        "95% interval, for one look. Shaded: smaller than the smallest effect worth having. An arrow: beyond the scale."
    )
    return (*pictures, Paragraph(text))


def comparisons(standing: Standing, *, partial: bool) -> tuple[Block, ...]:
    """Every arm's effect, with its verdict unless the report is partial, and the seeds that have no loss."""
    baseline = standing.snapshot.study.baseline
    columns: tuple[tuple[str, Kind], ...] = (
        ("arm", "arm"),
        *(() if partial else (("verdict", "text"),)),
        ("better by [nats/token]", "number"),
        ("95% interval", "number"),
        ("[% of the baseline's loss]", "number"),
        ("95% interval", "number"),
        ("pairs", "number"),
        ("E", "number"),
    )
    rows = [(c.arm, *(() if partial else (_verdict_or_role(standing, c),)), *_effect(c)) for c in standing.comparisons]
    spread = ""
    if standing.baseline_mean is not None:
        spread = f"{baseline} ends at {plain(standing.baseline_mean, loss_digits(standing, 5))} nats/token on average"
        if standing.baseline_sd is not None:
            spread += f", with a run-to-run standard deviation of {plain(standing.baseline_sd)}"
        in_sd = next((c.estimates.margin_in_run_sd for c in standing.comparisons if c.estimates.margin_in_run_sd), None)
        if in_sd is not None:
            spread += f"; the smallest effect worth having is {plain(in_sd)} of these standard deviations"
        spread += ". "
    note = (
        f"{spread}Better by: {baseline}'s final validation loss minus the arm's {same_seed(standing)}, averaged over "
        f"the pairs; negative is worse. {_at_every_look(standing)}E is the evidence against no improvement: 1 says "
        "nothing, and chance alone reaches 1/level in at most that level of all studies, however often one looks. "
        "The arms that are control or reference are described, not decided."
    )
    return (Table(columns, tuple(rows)), *_without_loss(standing), Paragraph(note))


def _at_every_look(standing: Standing) -> str:
    """How the interval of a plan that may stop at any look is meant, and the one that holds at all of them."""
    decision = standing.snapshot.study.decision
    assert decision is not None
    if decision.plan != "sequential":
        return ""
    text = "The 95% interval is exact for one look at a number of pairs that no result chose. "
    held = [(c.arm, c.estimates.confidence_sequence) for c in standing.decided if c.estimates.confidence_sequence]
    if held:
        spelt = listed(f"{arm} {bracket(interval)}" for arm, interval in held)
        text += f"Valid however often one looks is the 90% confidence sequence: {spelt} nats/token. "
    return text


def _without_loss(standing: Standing) -> tuple[Block, ...]:
    """The seeds on which an arm diverged, failed or lacks a run; nothing where there is none."""
    found = [c for c in standing.comparisons if c.diverged or c.failed or c.missing]
    if not found:
        return ()
    columns: tuple[tuple[str, Kind], ...] = (
        ("arm", "arm"),
        ("diverged", "text"),
        ("failed", "text"),
        ("missing in it or the baseline", "text"),
    )
    rows = [(c.arm, _of_seeds(c.diverged), _of_seeds(c.failed), _of_seeds(c.missing)) for c in found]
    return (Table(columns, tuple(rows)),)


def _verdict_or_role(standing: Standing, c: ArmComparison) -> str:
    return _verdict(standing, c) if c.decision else c.role


def _effect(c: ArmComparison) -> tuple[str, ...]:
    e = c.estimates
    if e.mean_diff is None or e.rel_diff_pct is None or e.e_value is None:
        return (ABSENT, e.undefined["mean_diff"], ABSENT, ABSENT, str(e.n), ABSENT)
    return (
        signed(e.mean_diff, half_width(e.ci95, e.mean_diff)),
        bracket(e.ci95) if e.ci95 else f"none: {e.undefined['ci95']}",
        signed(e.rel_diff_pct, half_width(e.rel_ci95_pct, e.rel_diff_pct)) + "%",
        bracket(e.rel_ci95_pct, "%") if e.rel_ci95_pct else ABSENT,
        str(e.n),
        plain(e.e_value),
    )


def _verdict(standing: Standing, c: ArmComparison) -> str:
    """The verdict, and beside it that a guardrail failed, and that it is a rehearsal's."""
    assert c.decision is not None
    verdict = c.decision.verdict
    judged = verdict not in (Verdict.INVALID, Verdict.INCOMPLETE)
    failed = ", guardrail failed" if judged and broken_guardrails(standing, c) else ""
    return f"{verdict.value}{failed}{', rehearsal' if standing.snapshot.study.twin_of else ''}"


def _of_seeds(seeds: Sequence[int]) -> str:
    return f"{len(seeds)}: {'seed' if len(seeds) == 1 else 'seeds'} {listed(seeds)}" if seeds else "0"


def reasons(standing: Standing) -> tuple[Block, ...]:
    """Why each challenger's verdict is what it is."""
    blocks: list[Block] = []
    for c in standing.decided:
        assert c.decision is not None
        d = c.decision
        found = list(d.reasons)
        if d.p_adjusted is not None and d.correction == "dunnett":
            found.append(f"Dunnett's test over {count(d.family_size, 'challenger')}: p = {d.p_adjusted:.3g}")
        elif d.p_adjusted is not None:
            family = f", Holm over {d.family_size} challengers" if d.family_size > 1 else ""
            found.append(f"one-sided paired t: p = {d.p_adjusted:.3g}{family}; exact only for one look at a fixed n")
        if c.differences and standing.snapshot.study.provenance == "run":
            found.append(worst_pair(c))
        names = standing.snapshot.study.arms
        blocks.append(Bullets(shortened(found, names), f"{c.arm}: {_verdict(standing, c)}"))
    if standing.passed is not None:
        blocks.append(Bullets(tuple(standing.passed.reasons), f"Pass criterion of the study: {standing.passed.word}"))
    return tuple(blocks)


def described(standing: Standing) -> tuple[Block, ...]:
    """What else was reported, of results that others report."""
    found = standing.snapshot.described
    return (Bullets(tuple(map(one_line, found))),) if found else ()


def evidence(standing: Standing, drawn: Sequence[str]) -> tuple[Block, ...]:
    """The evidence as it grew."""
    pictures = pictures_of(drawn, "evidence", "evidence_below")
    if not pictures:
        return ()
    decision = standing.snapshot.study.decision
    assert decision is not None
    text = (
        "E after each pair, in the order of the seeds, and the line above which a claim is established. First: that "
        f"the arm improves on {standing.snapshot.study.baseline}. Second: that it does not by {margin_text(standing)} "
        "or more; that it is not worse by as much is the third claim, of which the last E is given, under Reasons. "
        "A last look may establish by t what is under the line."
    )
    if decision.plan != "sequential":
        text += f" The plan looks once, at {decision.plan.fixed} pairs, and decides by t: E is shown for information."
    return (*pictures, Paragraph(text))


def curves(standing: Standing, drawn: Sequence[str]) -> tuple[Block, ...]:
    """The loss curves behind the differences."""
    pictures = pictures_of(drawn, "losses", "early", "finish", "differences")
    if not pictures:
        return ()
    text = (
        "A faint line is one run (or one seed's pair), a thick line the mean of an arm, drawn as far as all its runs "
        f"go on (a cross: one of them diverged there). Up is better than {standing.snapshot.study.baseline} in the "
        "differences; the shaded zone is where the early guardrail looks."
    )
    return (*pictures, Paragraph(text))
