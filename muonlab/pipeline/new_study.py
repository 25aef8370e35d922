"""Declare a new study: study.yaml, the grid made from it, and a README that begins with the question."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from muonlab.pipeline import doors, twins
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import check_study, declared_slugs, load_params, read_declaration
from muonlab.pipeline.tuning_checks import check_seeds, check_tuning
from muonlab.registry.errors import UsageError, explain
from muonlab.registry.study import Study
from muonlab.reporting.tuning_wording import UNTUNED

README = """# {slug}

**Hypothesis.** {question}

**What its outcome decides.** (to be written before the first run)

**Outcome.** (to be written after the last)
"""


TUNING_README = """# {slug}

**What for.** {question}

**Outcome.** `muon study run {slug}` writes [its report](../../reports/{slug}/report.md), and its choice into
params.yaml.
"""

FIRST_TUNING_SEED = 1000
"""Beyond the seeds that comparisons begin with: what was chosen on a seed is not judged on it."""


def new_study(
    layout: Layout,
    slug: str,
    *,
    kind: Literal["comparison", "tuning"],
    baseline: str,
    challengers: tuple[str, ...],
    question: str,
    min_effect: str | None,
    grid: tuple[str, ...],
    tuning: str,
    workload: str,
    seeds: int | None,
    price: float,
    budget: float,
) -> Path:
    """Write experiments/<slug>/ and return it; raises UsageError, before anything is written, for wrong input.

    `grid`: of a tuning study, its options as `lr=0.01,0.02`. `seeds`: how many; by default 5 from 0 of a comparison, 2
    from 1000 of a tuning study.
    """
    folder = layout.study(slug)
    if folder.exists():
        raise UsageError(f"experiments/{slug}: it exists already; choose another name.")
    if kind == "tuning":
        own = _tuning(min_effect, grid, tuning, seeds or 2)
    else:
        own = _comparison(min_effect, grid, tuning, seeds or 5)
    declared: dict[str, Any] = {
        "slug": slug,
        "question": question,
        "kind": kind,
        "provenance": "run",
        "workload": workload,
        "baseline": baseline,
        "challengers": list(challengers),
        "control": [],
        "reference": [],
        **own,
        "price_usd_per_gpu_hour": price,
        "budget_usd": budget,
        "requires": [],
    }
    try:
        study = Study.model_validate(declared)
    except ValidationError as error:
        raise explain(error, f"experiments/{slug}/study.yaml", prefix="study") from None
    twins.refuse_unfit(study, declared_slugs(layout), functools.partial(read_declaration, layout))
    check_study(load_params(layout.params), study)
    check_tuning(layout, study)
    check_seeds(layout, study)
    folder.mkdir(parents=True)
    text = yaml.safe_dump({"study": declared}, sort_keys=False, default_flow_style=None, width=110)
    (folder / "study.yaml").write_text(text, encoding="utf-8")
    readme = TUNING_README if kind == "tuning" else README
    (folder / "README.md").write_text(readme.format(slug=slug, question=question), encoding="utf-8")
    if kind == "comparison":
        doors.write_grid(layout, study)
    return folder


def _comparison(min_effect: str | None, grid: tuple[str, ...], tuning: str, seeds: int) -> dict[str, Any]:
    if min_effect is None:
        raise UsageError(
            "--min-effect: a comparison needs it, declared before the first run; give a percentage like 0.5% or a loss "
            "in nats/token."
        )
    if grid:
        raise UsageError("--grid: a comparison compares arms as they are configured; a grid takes --kind tuning.")
    number = min_effect if min_effect.rstrip().endswith("%") else _number(min_effect)
    return {
        "seeds": list(range(seeds)),
        "decision": {
            "metric": "val_loss", "min_effect": number, "alpha": 0.05, "plan": "sequential",
            "n_min": 4, "n_max": max(12, seeds), "g": 2, "max_early_regress": "2%",
        },
        "tuning": tuning,
    }  # fmt: skip


def _tuning(min_effect: str | None, grid: tuple[str, ...], tuning: str, seeds: int) -> dict[str, Any]:
    if min_effect is not None or tuning != UNTUNED:
        option = "--min-effect" if min_effect is not None else "--tuning"
        raise UsageError(f"{option}: a tuning study decides nothing and tunes itself; leave the option out.")
    if not grid:
        raise UsageError("--grid: a tuning study needs one, such as --grid lr=0.005,0.01,0.02.")
    found: dict[str, list[Any]] = {}
    for text in grid:
        option, equals, values = text.partition("=")
        if not (option and equals and values):
            raise UsageError(f"--grid: found {text!r}; it should be OPTION=VALUE,VALUE such as lr=0.005,0.01,0.02.")
        if option in found:
            raise UsageError(f"--grid: {option!r} is given twice; give all its values at once.")
        found[option] = [_value(value.strip()) for value in values.split(",")]
    return {"seeds": list(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds)), "grid": found}


def _value(text: str) -> Any:
    """A value as YAML would read it: number, truth value, or text."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f"--min-effect: found {text!r}; it should be a percentage like 0.5% or a loss in nats/token."
        ) from None
