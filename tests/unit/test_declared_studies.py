"""The repository's own studies: each resolves, rehearses, is priced as its pages say, and fits its budget."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import check_study, grid_points, load_params, load_study
from muonlab.registry.study import Study

ROOT = Path(__file__).parents[2]
LAYOUT = Layout(root=ROOT, main=ROOT)
PARAMS = load_params(LAYOUT.params)
SLUGS = sorted(path.parent.name for path in (ROOT / "experiments").glob("*/study.yaml"))
STUDIES = {slug: load_study(LAYOUT, slug) for slug in SLUGS}
RUN_HERE = [study for study in STUDIES.values() if study.provenance == "run"]
PAID = [study for study in RUN_HERE if study.price_usd_per_gpu_hour > 0]


def cost_usd(study: Study) -> float:
    """Of the declared runs, at the workload's declared pace."""
    workload = PARAMS.workloads[study.workload]
    assert workload.pace is not None
    runs = len(study.arms) * len(study.seeds) * len(grid_points(study))
    hours = runs * workload.settings.steps * workload.pace.seconds_per_step / 3600
    return hours * study.price_usd_per_gpu_hour


@pytest.mark.parametrize("study", RUN_HERE, ids=lambda study: study.slug)
def test_a_study_and_its_rehearsals_resolve(study: Study) -> None:
    check_study(PARAMS, study)
    for name in study.twins:
        check_study(PARAMS, study.twin(name))


@pytest.mark.parametrize("study", PAID, ids=lambda study: study.slug)
def test_a_paid_study_rehearses_offline(study: Study) -> None:
    rehearsal = study.twin("tiny")
    assert PARAMS.workloads[rehearsal.workload].settings.data.source == "gensim-wiki"
    assert (rehearsal.price_usd_per_gpu_hour, rehearsal.budget_usd) == (0, 0)


@pytest.mark.parametrize("study", PAID, ids=lambda study: study.slug)
def test_a_budget_pays_for_the_declared_runs(study: Study) -> None:
    assert cost_usd(study) <= study.budget_usd


@pytest.mark.parametrize("study", PAID, ids=lambda study: study.slug)
def test_the_pages_state_the_price(study: Study) -> None:
    price = f"${cost_usd(study):.2f}"
    assert f"{price} at" in " ".join((LAYOUT.study(study.slug) / "README.md").read_text(encoding="utf-8").split())
    (row,) = [line for line in index_rows() if f"[{study.slug}]" in line]
    assert price in row


def test_the_index_names_every_study() -> None:
    named = [match[1] for line in index_rows() if (match := re.match(r"\| \[([^\]]+)\]", line))]
    assert named == SLUGS


def index_rows() -> list[str]:
    return (ROOT / "experiments" / "README.md").read_text(encoding="utf-8").splitlines()


def test_a_readme_begins_with_what_the_study_is_for() -> None:
    for study in RUN_HERE:
        opening = (LAYOUT.study(study.slug) / "README.md").read_text(encoding="utf-8").split("\n\n")[1]
        assert opening.startswith(("**Hypothesis.**", "**What for.**")), study.slug
