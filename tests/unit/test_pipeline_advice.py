"""`muon next`: what is worth running follows from where the study stands, and what must be mended comes first."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from reporting_studies import BASELINE, NOISY, NOLAH, STRONG, Outcome, made_up, shifted

from muonlab.pipeline.advice import Advice, advice_on
from muonlab.registry.settings import Params
from muonlab.reporting.standing import Standing

PARAMS = Params.model_validate(yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text()))
OPEN: dict[str, list[Outcome]] = {"muon": list(BASELINE), "nolah": shifted([0.02, 0.005, 0.03, 0.01, 0.012])}


def advised(standing: Standing) -> Advice:
    return advice_on(standing, PARAMS)


def test_an_open_study_asks_for_the_next_seeds_of_all_its_arms():
    standing = made_up({**OPEN, "isotropic": NOISY}, control=["isotropic"], price=2.8)
    (comparison,) = standing.decided
    assert comparison.decision is not None
    advice = advised(standing)
    more = comparison.decision.next_pairs
    assert more is not None
    assert (advice.exit_code, advice.stop) == (0, False)
    assert advice.seeds == list(range(5, 5 + more))
    its = advice.challengers["nolah"]
    assert (its.next_pairs, its.decision_chance) == (more, comparison.decision.decision_chance)
    assert its.cost_usd == pytest.approx(more * comparison.pair_cost_usd)
    # Every arm has cost the same in the made-up study, and all three run the new seeds.
    assert advice.cost_usd == pytest.approx(1.5 * its.cost_usd)
    assert advice.seconds == pytest.approx(1.5 * (its.seconds or 0))
    assert advice.budget_left_usd == pytest.approx(280 - standing.total_cost_usd)
    text = "\n".join(advice.lines())
    assert f"{comparison.decision.decision_chance:.0%}" in text
    assert f"seeds: {list(range(5 + more))}" in text
    assert "muon study run 001-made-up" in text
    assert f"-S study=001-made-up -S optimizer=muon,nolah -S 'seed=range(5,{5 + more})'" in text
    assert "isotropic" not in " ".join(advice.pairs_alone)


@pytest.mark.parametrize(
    ("standing", "code", "words"),
    [
        (made_up({"muon": BASELINE, "nolah": STRONG}), 0, "every challenger is decided"),
        (made_up({**OPEN}, decision={"n_max": 5}), 0, "the plan has ended with all its pairs and nolah undecided"),
        (made_up({**OPEN}, decision={"plan": {"fixed": 5}}), 0, "keep muon, which is not evidence of no effect"),
        (made_up({arm: runs[:1] for arm, runs in OPEN.items()}, provenance="reported"), 0, "reported by others"),
        (made_up({**OPEN}, findings=["cell nolah-1: edited"]), 5, "- cell nolah-1: edited"),
        (made_up({**OPEN}, unlike=["nolah"]), 5, "do not share their data"),
        (made_up({**OPEN}, price=2.8, budget_usd=0.2), 4, "raising budget_usd changes the declaration"),
    ],
)
def test_it_says_stop_and_why(standing: Standing, code: int, words: str):
    advice = advised(standing)
    assert advice.exit_code == code
    assert advice.stop
    assert advice.commands == []
    assert words in "\n".join(advice.lines())


def test_the_declared_runs_come_first():
    advice = advised(made_up({"muon": BASELINE, "nolah": [*NOLAH[:3], "failed", None]}))
    assert (advice.exit_code, advice.seeds, advice.stop) == (3, [3, 4], False)
    assert advice.commands == ["muon study run 001-made-up"]
    text = "\n".join(advice.lines())
    assert "nolah-3 failed, nolah-4 missing" in text
    assert "OutOfMemory" in text
    assert "seeds:" not in text


def test_a_first_pair_has_no_predictive_chance():
    advice = advised(made_up({"muon": BASELINE[:1], "nolah": STRONG[:1]}))
    assert advice.seeds == [1, 2, 3]
    assert advice.challengers["nolah"].decision_chance is None
    assert "one pair has no spread to predict from" in "\n".join(advice.lines())


def test_none_run_has_no_price():
    advice = advised(made_up({"muon": [None] * 3, "nolah": [None] * 3}))
    assert (advice.exit_code, advice.cost_usd, advice.seconds) == (3, None, None)
