"""The errors that a rule makes on simulated studies, for every kind of noise, and for a study's own.

Numbers come from `muonlab.stats.calibration`; here they are gathered, and printed as a table within 80 columns.
"""

from __future__ import annotations

import textwrap

from muonlab.registry.settings import Closed
from muonlab.stats.calibration import NULLS, Calibration, ErrorRate, measure, resampled
from muonlab.stats.kernel import Cache
from muonlab.stats.rule import Rule
from muonlab.stats.sample import Floats
from muonlab.stats.simulate import NoiseRate, false_go_rate

WIDTH = 80


class OwnNoise(Closed):
    """What the rule does with the noise of a study at hand."""

    study: str
    challengers: tuple[str, ...]
    family_size: int
    """The challengers, and the undeclared arms that count beside them."""
    false_go: NoiseRate
    calibration: Calibration


class CalibrationReport(Closed):
    """Measured errors of one rule under every null."""

    rule: Rule
    studies: int
    """Simulated studies of each null."""
    seed: int
    nulls: tuple[Calibration, ...]
    own: OwnNoise | None

    @property
    def kept(self) -> bool:
        """Whether no promise was broken beyond Monte Carlo error."""
        return all(error.outcome != "broken" for null in self.nulls for error in null.errors)


def calibrate(
    rule: Rule,
    *,
    studies: int,
    seed: int,
    own: tuple[str, tuple[str, ...], Floats] | None = None,
    undeclared: int = 0,
    cache: Cache | None = None,
) -> CalibrationReport:
    """Measure a rule under every null, and under a study's own noise.

    own: the study's name, its challengers [J] and their paired differences [n, J] on the same seeds; undeclared: arms
    that count in its family beside them, and are never rejected. Raises ValueError as `simulate.false_go_rate` does.
    """
    nulls = tuple(measure(null, rule, studies=studies, seed=seed, cache=cache) for null in NULLS)
    noise = None
    if own is not None:
        study, challengers, differences = own
        size = len(challengers) + undeclared
        noise = OwnNoise(
            study=study,
            challengers=challengers,
            family_size=size,
            false_go=false_go_rate(differences, rule, family_size=size, studies=studies, seed=seed, cache=cache),
            calibration=measure(
                resampled(differences), rule, family_size=size, studies=studies, seed=seed, cache=cache
            ),
        )
    return CalibrationReport(rule=rule, studies=studies, seed=seed, nulls=nulls, own=noise)


def render(report: CalibrationReport) -> str:
    """The table within 80 columns, one line an error, then what the nulls are and what the figures mean."""
    measured = [*report.nulls, *([report.own.calibration] if report.own else [])]
    lines = [_head(report), "", f"{'noise':<14} {'wrong verdict':<20} {'measured':>8} {'± MC':>6}  promise"]
    for null in measured:
        lines += [
            f"{null.null if i == 0 else '':<14} {error.wrong:<20} {error.rate.value:>8.2%} "
            f"{error.rate.standard_error:>6.2%}  {_promise(error)}"
            for i, error in enumerate(null.errors)
        ]
    lines.append("")
    lines += [_wrap(f"{null.null}: {null.about}.", "  ") for null in measured]
    settings = dict.fromkeys(f"{e.wrong}: {e.setting}" for e in measured[0].errors)
    lines += ["", *(_wrap(setting + ".", "  ") for setting in settings)]
    for reason in dict.fromkeys(e.undefined["promise"] for null in measured for e in null.errors if e.undefined):
        lines.append(_wrap(f"not promised: {reason}.", "  "))
    if report.own is not None:
        own = report.own
        more = own.family_size - len(own.challengers)
        family = f", in a family of {own.family_size}" if more else ""
        lines += ["", _wrap(f"{own.study} ({', '.join(own.challengers)}{family}): {own.false_go.sentence}.", "")]
    lines += [
        "",
        "No promise is broken beyond Monte Carlo error." if report.kept else "A promise is broken: see the table.",
    ]
    return "\n".join(lines)


def _head(report: CalibrationReport) -> str:
    rule = report.rule
    end = rule.n_max if rule.plan == "sequential" else rule.fixed_n
    plan = f"sequential, {rule.n_min} to {end} pairs" if rule.plan == "sequential" else f"fixed, {end} pairs"
    amended = ", amended: the e-process alone" if rule.amended else ""
    return _wrap(
        f"{report.studies:,} studies a row; plan {plan}{amended}, alpha {rule.alpha:g}, g {rule.g:g}, "
        f"seed {report.seed}",
        "",
    )


def _promise(error: ErrorRate) -> str:
    if error.promise is None:
        return "not promised"
    return f"at most {error.promise:.2%}: {error.outcome}"


def _wrap(text: str, indent: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")
