"""Until decided: the loop does what the advice says and no more, pays what it may, and adds to the seeds only."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from reporting_studies import BASELINE, REPORTED, Outcome, made_up

from muonlab.pipeline.advice import Advice, ArmAdvice, advice_on
from muonlab.pipeline.study_run import RunOutcome
from muonlab.pipeline.until_decided import Loop, add_seeds, loop, next_step, refuse_undecidable
from muonlab.registry.errors import UsageError
from muonlab.registry.settings import Params
from muonlab.registry.study import Study
from muonlab.registry.verdict import Verdict
from muonlab.reporting.standing import Standing

PROJECT = Path(__file__).parents[2]
PARAMS = Params.model_validate(yaml.safe_load((PROJECT / "params.yaml").read_text()))
N_MAX = 6
LEVELS = [*BASELINE, 4.29]

GAINS = st.lists(
    st.sampled_from([-0.06, -0.03, -0.01, -0.002, 0.0, 0.002, 0.01, 0.02, 0.03, 0.05]), min_size=N_MAX, max_size=N_MAX
)


def standing_of(gains: Sequence[float], pairs: int, **changes: object) -> Standing:
    """The made-up study after so many pairs; a gain that repeats is told apart, as losses of real runs are."""
    runs: list[Outcome] = [base - gain - 1e-5 * i * i for i, (base, gain) in enumerate(zip(LEVELS, gains, strict=True))]
    return made_up({"muon": LEVELS[:pairs], "nolah": runs[:pairs]}, decision={"n_min": 2, "n_max": N_MAX}, **changes)  # type: ignore[arg-type]


class World:
    """A study whose runs have these outcomes, whoever makes them; `first` pairs are declared."""

    def __init__(self, gains: Sequence[float], *, first: int = 2, price: float = 0.0) -> None:
        self.gains, self.pairs, self.price = gains, first, price
        self.made = 0
        self.limits: list[float | None] = []

    def standing(self) -> Standing:
        return standing_of(self.gains, self.pairs, price=self.price)

    def spent(self) -> float:
        return sum(c.cost_usd for c in self.standing().cells if c.seed < self.made)

    def run(self, limit: float | None) -> RunOutcome:
        self.limits.append(limit)
        self.made = self.pairs
        return RunOutcome(self.standing(), trained=0, restored=0, failed={}, seconds=0.0)

    def add(self, seeds: list[int]) -> None:
        assert seeds == list(range(self.pairs, self.pairs + len(seeds)))
        self.pairs += len(seeds)

    def loop(self, *, max_cost_usd: float | None = None) -> Loop:
        return loop(
            self.run,
            advise=lambda outcome: advice_on(outcome.standing, PARAMS),
            add=self.add,
            spent=self.spent,
            say=lambda text: None,
            max_cost_usd=max_cost_usd,
        )


@settings(max_examples=15, deadline=None)
@given(GAINS)
def test_every_look_is_that_of_the_study_declared_with_its_seeds_at_once(gains: list[float]) -> None:
    world = World(gains)
    found = world.loop()
    pairs = 2
    for look in found.looks:
        at_once = standing_of(gains, pairs)
        advice = advice_on(at_once, PARAMS)
        (comparison,) = at_once.decided
        assert comparison.decision is not None
        assert (look.pairs, look.verdicts) == (pairs, {"nolah": comparison.decision.verdict.value})
        assert look.seeds_added == ([] if advice.stop else advice.seeds)
        pairs += len(look.seeds_added)
    assert found.looks[-1].seeds_added == []
    assert found.looks[-1].verdicts["nolah"] != "INCONCLUSIVE" or found.looks[-1].pairs == N_MAX


@settings(max_examples=15, deadline=None)
@given(GAINS, GAINS)
def test_what_was_not_looked_at_changes_nothing(gains: list[float], others: list[float]) -> None:
    found = World(gains).loop()
    seen = found.looks[-1].pairs
    assert World([*gains[:seen], *others[seen:]]).loop().looks == found.looks


VERDICTS = st.sampled_from(list(Verdict))
DOLLARS = st.floats(0, 1000)
ARMS = st.builds(
    ArmAdvice, verdict=VERDICTS, reasons=st.just(["r"]), next_pairs=st.none() | st.integers(1, 9),
    decision_chance=st.none() | st.floats(0, 1), cost_usd=st.none() | DOLLARS, seconds=st.none() | DOLLARS,
)  # fmt: skip


def advice(*, stop: bool, seeds: list[int], code: int, cost: float, arms: dict[str, ArmAdvice], left: float) -> Advice:
    return Advice(
        study="s", stop=stop, why=["w"], challengers=arms, seeds=seeds, cost_usd=cost, seconds=1.0,
        budget_left_usd=left, edit=None, commands=[], pairs_alone=[], exit_code=code,
    )  # fmt: skip


@given(
    st.booleans(), st.lists(st.integers(0, 20), min_size=1, max_size=3), st.sampled_from([0, 3, 4, 5]), DOLLARS,
    st.none() | DOLLARS, st.tuples(*[st.dictionaries(st.just("nolah"), ARMS)] * 2), st.tuples(DOLLARS, DOLLARS),
)  # fmt: skip
def test_whether_to_go_on_is_read_from_what_the_advice_asks_for_and_from_its_price(
    stop: bool,
    seeds: list[int],
    code: int,
    cost: float,
    left: float | None,
    arms: tuple[dict[str, ArmAdvice], dict[str, ArmAdvice]],
    budgets: tuple[float, float],
) -> None:
    one, two = (
        next_step(advice(stop=stop, seeds=seeds, code=code, cost=cost, arms=a, left=b), left)
        for a, b in zip(arms, budgets, strict=True)
    )
    assert one == two
    goes_on = not stop and code == 0 and (left is None or cost <= left)
    assert one.seeds == (seeds if goes_on else [])
    assert one.exit_code == (0 if goes_on else 4 if not stop and code == 0 else code)


OPEN = [0.02, 0.002, 0.03, 0.01, 0.02, 0.01]


def test_the_limit_is_of_the_whole_loop_and_seeds_that_it_does_not_pay_are_not_added() -> None:
    world = World(OPEN, price=3600.0)
    free = World(OPEN, price=3600.0).loop()
    assert [look.pairs for look in free.looks] == [2, 6]
    first = free.looks[0].cost_usd
    assert first == pytest.approx(standing_of(OPEN, 2, price=3600.0).total_cost_usd)
    assert sum(look.cost_usd for look in free.looks) == pytest.approx(standing_of(OPEN, 6, price=3600.0).total_cost_usd)
    more = advice_on(standing_of(OPEN, 2, price=3600.0), PARAMS).cost_usd
    assert more is not None
    found = world.loop(max_cost_usd=first + more - 0.01)
    assert (found.last.exit_code, world.pairs, [look.pairs for look in found.looks]) == (4, 2, [2])
    assert "left of --max-cost" in found.last.why[-1]
    enough = World(OPEN, price=3600.0)
    assert enough.loop(max_cost_usd=first + more + 0.01).last.exit_code == 0
    assert enough.limits == [first + more + 0.01, pytest.approx(more + 0.01)]


def test_a_run_that_a_limit_stopped_is_looked_at_once_and_not_advised_on() -> None:
    outcome = RunOutcome(standing_of(OPEN, 2), trained=1, restored=0, failed={}, seconds=1.0, over_budget="enough.")

    def never(_: object) -> Advice:
        raise AssertionError("no advice is asked for")

    found = loop(
        lambda limit: outcome, advise=never, add=never, spent=lambda: 0.0, say=lambda text: None, max_cost_usd=1.0
    )
    assert (found.last.exit_code, found.last.why, len(found.looks)) == (4, ["enough."], 1)


SEQUENTIAL = [
    path
    for path in sorted(PROJECT.glob("experiments/*/study.yaml"))
    if "plan: sequential" in path.read_text() and "provenance: reported" not in path.read_text()
]
BLOCK = """\
# top
study:
  challengers: [ nolah ]   # c
  seeds:   # those
  - 0
  - 1      # the last so far

  # about the decision
  decision: {min_effect: 0.5%,   n_max: 12}
"""


FILES = {"block": BLOCK, **{path.parent.name: path.read_text() for path in SEQUENTIAL}}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_adding_seeds_leaves_every_other_character(tmp_path: Path, text: str) -> None:
    path = tmp_path / "001-x" / "study.yaml"
    path.parent.mkdir()
    path.write_text(text)
    before = yaml.safe_load(text)["study"]
    add_seeds(path, [90, 91])
    add_seeds(path, [92])
    after = yaml.safe_load(path.read_text())["study"]
    assert after == {**before, "seeds": [*before["seeds"], 90, 91, 92]}
    changed = [line for line in difflib.ndiff(text.splitlines(), path.read_text().splitlines()) if line[0] == "-"]
    assert changed == [line for line in changed if line.startswith("-   seeds: [")]
    assert len(changed) == (0 if text == BLOCK else 1)
    assert path.read_text().count("#") == text.count("#")


def test_seeds_that_are_no_list_of_their_own_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "001-x" / "study.yaml"
    path.parent.mkdir()
    path.write_text("study: {seeds: [0, &last 1]}\n")
    with pytest.raises(UsageError, match=r"001-x/study.yaml: further seeds could not .*write seeds: \[0, 1, 2\]"):
        add_seeds(path, [2])
    assert path.read_text() == "study: {seeds: [0, &last 1]}\n"


def declared(**changes: object) -> Study:
    return Study.model_validate(
        {
            "slug": "001-x", "question": "?", "workload": "tiny", "baseline": "muon", "challengers": ["nolah"],
            "seeds": [0, 1, 2, 3], "decision": {"min_effect": "1%"}, "price_usd_per_gpu_hour": 0, "budget_usd": 0,
            "twins": {"tiny": {"workload": "tiny"}}, **changes,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("study", "words"),
    [
        (declared(decision={"min_effect": "1%", "plan": {"fixed": 4}}), "this plan is fixed at 4 seeds"),
        (declared(kind="tuning", grid={"lr": [1]}), "tuning study"),
        (declared(provenance="reported", reported=REPORTED, workload="large", seeds=[0]), "reported by others"),
        (declared().twin("tiny"), "a rehearsal of 001-x"),
    ],
)
def test_a_study_that_no_further_seed_may_decide_is_refused_in_one_sentence(study: Study, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        refuse_undecidable(study)
    assert str(refused.value).count(". ") == 0
    refuse_undecidable(declared())
