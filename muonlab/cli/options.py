"""What several commands read from their options, each refusal naming its option."""

from __future__ import annotations

import glob
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.types import FloatParamType

from muonlab.cli.terminal import tell
from muonlab.registry.errors import UsageError

if TYPE_CHECKING:
    from muonlab.analysis.threshold_cache import ThresholdCache
    from muonlab.pipeline.answer import Answer
    from muonlab.pipeline.layout import Layout
    from muonlab.reporting.standing import Standing
    from muonlab.stats.rule import Rule


class Finite(FloatParamType):
    """A number. click would take nan, which no bound holds back and no cost ever exceeds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number; raises UsageError for nan and infinity."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            raise UsageError(f"{param.opts[0] if param else 'a number'}: found {value}; give a finite number.")
        return number


class FiniteRange(Finite, click.FloatRange):
    """A number between bounds."""


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout; all else goes to stderr."
)


workload_option = click.option(
    "--workload", "twin", metavar="NAME", help="Its rehearsal NAME instead, a twin that study.yaml declares."
)


def studies(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """Studies whose folders begin so, for the shell; none outside of a repository."""
    from muonlab.pipeline.layout import Layout

    try:
        found = (Layout.find().root / "experiments").glob(f"{glob.escape(begun)}*/study.yaml")
    except UsageError:
        return []
    return sorted(path.parent.name for path in found)


study_argument = click.argument("slug", metavar="[STUDY]", required=False, shell_complete=studies)


def slug_of(layout: Layout, slug: str | None, twin: str | None) -> str:
    """The study that a command line names: SLUG, else the one of params.yaml; with --workload, that twin of it."""
    from muonlab.pipeline.resolve import load_params, load_study
    from muonlab.pipeline.twins import twin_slug

    slug = slug or load_params(layout.params).study
    return slug if twin is None else twin_slug(load_study(layout, slug), twin)


def say(answer: Answer, as_json: bool) -> None:
    """Print an answer on standard output, as sentences or as one JSON object."""
    if as_json:
        click.echo(answer.model_dump_json(indent=2))
    else:
        for line in answer.lines():
            tell(line)


def size(option: str, text: str) -> tuple[float, str]:
    """A positive size as (number, `percent` or `nats`), from `0.5%` or an absolute loss."""
    from muonlab.registry.study import percent_or_number

    try:
        number: object = float(text)
    except ValueError:
        number = text
    try:
        checked = percent_or_number(number)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None
    if isinstance(checked, str):
        return float(checked.rstrip("%")), "percent"
    assert isinstance(checked, float)
    return checked, "nats"


def columns(pairs: tuple[str, ...]) -> dict[str, str]:
    """Our column -> the file's, from the values of --column."""
    found: dict[str, str] = {}
    for text in pairs:
        ours, separator, theirs = text.partition("=")
        if not (ours and separator and theirs):
            raise UsageError(f"--column: found {text!r}; it should be OURS=THEIRS, such as loss=val/loss.")
        if ours in found:
            raise UsageError(f"--column: {ours!r} is named twice, as {found[ours]!r} and as {theirs!r}; keep one.")
        found[ours] = theirs
    return found


def t_star_cache() -> ThresholdCache:
    """The user's t* from earlier commands. A study's own verdict never reads it: a file is easily edited."""
    from muonlab.analysis.threshold_cache import ThresholdCache

    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return ThresholdCache(Path(home) / "muonlab" / "t_star.json")


def standing_of(slug: str) -> Standing:
    """The last standing of a study; UsageError where it has none, and for a tuning study, which never has one."""
    from muonlab.pipeline.conclude import read_standing
    from muonlab.pipeline.layout import Layout
    from muonlab.pipeline.resolve import load_study

    layout = Layout.find()
    if load_study(layout, slug).kind == "tuning":
        raise UsageError(
            f"experiments/{slug}: it is a tuning study, which has no pairs and no verdict; name a comparison."
        )
    return read_standing(layout, slug)


def declared_rule(standing: Standing) -> dict[str, Any]:
    """A study's rule as it decides, under the names of the options; Holm's correction and `amended` have none.

    Raises UsageError where Dunnett's test decides between several challengers, which is not simulated.
    """
    snapshot = standing.snapshot
    decision = snapshot.study.decision
    assert decision is not None  # only a comparison has a standing
    size = family_size(standing)
    if decision.correction == "dunnett" and not snapshot.amended and size > 1:
        raise UsageError(
            f"experiments/{snapshot.study.slug}: Dunnett's test decides over its family of {size}, and only Holm's "
            "correction is simulated; give the rule and the noise by options, without this study."
        )
    fixed = decision.plan != "sequential"
    return {
        "alpha": decision.alpha,
        "n_min": decision.n_min,
        "n_max": decision.plan.fixed if not isinstance(decision.plan, str) else decision.n_max,
        "g": decision.g,
        "plan": "fixed" if fixed else "sequential",
        "amended": snapshot.amended,
    }


def family_size(standing: Standing) -> int:
    """Over how many arms a study's error rate is kept: its challengers, and the undeclared arms that count."""
    return len(standing.decided) + standing.undeclared


def rule_of(asked: dict[str, Any]) -> Rule:
    """The rule of what is asked for, under the names of `Rule`, at a min_effect of no consequence if none is given.

    Raises UsageError, which names the option.
    """
    from pydantic import ValidationError

    from muonlab.stats.rule import Rule

    n_min, n_max = asked.get("n_min", 4), asked.get("n_max", 12)
    if n_max < n_min:
        raise UsageError(f"--n-max is {n_max} and --n-min is {n_min}; n_max must be at least n_min: raise --n-max.")
    fixed_n = n_max if asked.get("plan") == "fixed" else None
    declared: dict[str, Any] = {"min_effect": 1.0, "min_effect_unit": "nats", **asked, "fixed_n": fixed_n}
    try:
        return Rule.model_validate(declared)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = "--" + str(first["loc"][0] if first["loc"] else "plan").replace("_", "-").replace("fixed-n", "n-max")
        message = str(first["msg"]).replace("Input", "it")
        raise UsageError(f"{option}: found {first['input']}; {message}.") from None
