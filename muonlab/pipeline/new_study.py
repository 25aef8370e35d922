"""Declare a new study: study.yaml, the grid made from it, and a README that begins with the hypothesis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from muonlab.pipeline import doors
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import check_study, load_params
from muonlab.registry.errors import UsageError, explain
from muonlab.registry.study import Study

README = """# {slug}

**Hypothesis.** {question}

**What its outcome decides.** (to be written before the first run)

**Outcome.** (to be written after the last)
"""


def new_study(
    layout: Layout,
    slug: str,
    *,
    baseline: str,
    challengers: tuple[str, ...],
    question: str,
    min_effect: str,
    workload: str,
    seeds: int,
    price: float,
    budget: float,
) -> Path:
    """Write experiments/<slug>/ and return it; raises UsageError, before anything is written, for wrong input."""
    folder = layout.study(slug)
    if folder.exists():
        raise UsageError(f"experiments/{slug}: it exists already; choose another name.")
    number = min_effect if min_effect.rstrip().endswith("%") else _number(min_effect)
    declared: dict[str, Any] = {
        "slug": slug,
        "question": question,
        "kind": "comparison",
        "provenance": "run",
        "workload": workload,
        "baseline": baseline,
        "challengers": list(challengers),
        "control": [],
        "reference": [],
        "seeds": list(range(seeds)),
        "decision": {
            "metric": "val_loss", "min_effect": number, "alpha": 0.05, "plan": "sequential",
            "n_min": 4, "n_max": max(12, seeds), "g": 2, "max_early_regress": "2%",
        },
        "price_usd_per_gpu_hour": price,
        "budget_usd": budget,
        "tuning": "untuned",
        "requires": [],
    }  # fmt: skip
    try:
        study = Study.model_validate(declared)
    except ValidationError as error:
        raise explain(error, f"experiments/{slug}/study.yaml", prefix="study") from None
    check_study(load_params(layout.params), study)
    folder.mkdir(parents=True)
    text = yaml.safe_dump({"study": declared}, sort_keys=False, default_flow_style=None, width=110)
    (folder / "study.yaml").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(README.format(slug=slug, question=question), encoding="utf-8")
    doors.write_grid(layout, study)
    return folder


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f"--min-effect: found {text!r}; it should be a percentage like 0.5% or a loss in nats/token."
        ) from None
