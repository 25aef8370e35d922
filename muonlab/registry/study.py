"""A study: the question, the arms, the seeds and the decision rule, declared before the first result.

Declared in `experiments/<slug>/study.yaml`. Whatever could be chosen after seeing results (which runs count,
how large an effect matters, when to stop) stands here, and its hash is registered before the first run.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from muonlab.registry.canonical import sha256_of
from muonlab.registry.errors import explains, nearest
from muonlab.registry.settings import Closed, Count, Name, Seed

Percent = Annotated[str, Field(pattern=r"^\d+(\.\d+)?\s*%$")]
MOST_PAIRS = 100
"""Nobody pairs more training runs, and the E-values stay finite."""
Role = Literal["baseline", "challenger", "control", "reference"]


def percent_or_number(value: object) -> object:
    """Accept `0.5%`, or a number; refuse what is not positive or is over 100 %."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"found {value!r}; it should be a positive number of nats/token or a percentage like 0.5%.")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value)
        if not match or not 0 < float(match[1]) <= 100:
            raise ValueError(
                f"found {value!r}; it should be a positive number of nats/token or a percentage between 0% and 100%."
            )
        return f"{float(match[1]):g}%"
    if not 0 < value < float("inf"):
        raise ValueError(f"found {value!r}; it should be positive.")
    return float(value)


@explains
class FixedPlan(Closed):
    """One look, after exactly `fixed` pairs."""

    fixed: Annotated[int, Field(ge=2, le=MOST_PAIRS, strict=True)]


@explains
class Decision(Closed):
    """The decision rule. Losses in nats/token; probabilities are one-sided."""

    metric: Literal["val_loss"] = "val_loss"
    min_effect: float | str
    """The smallest improvement worth having: absolute, or in percent of the baseline's mean."""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    plan: Literal["sequential"] | FixedPlan = "sequential"
    n_min: Annotated[int, Field(ge=2, le=MOST_PAIRS, strict=True)] = 4
    n_max: Annotated[int, Field(ge=2, le=MOST_PAIRS, strict=True)] = 12
    g: Annotated[float, Field(gt=0)] = 2.0
    correction: Literal["holm", "dunnett"] = "holm"
    """How the family's error rate is kept; `dunnett` (blocked by seed) looks once and needs equal variances."""
    max_early_regress: float | str = "2%"

    _min_effect = field_validator("min_effect", mode="before")(percent_or_number)

    @field_validator("max_early_regress", mode="before")
    @classmethod
    def _early_regress_is_percent(cls, value: object) -> object:
        checked = percent_or_number(value)
        if not isinstance(checked, str):
            raise ValueError(f"found {value!r}; it should be a percentage of the baseline's loss, like 2%.")
        return checked

    @model_validator(mode="after")
    def _n_max_holds_n_min(self) -> Decision:
        if self.n_max < self.n_min:
            raise ValueError(f"n_max is {self.n_max}, under n_min {self.n_min}; raise n_max or lower n_min.")
        if isinstance(self.plan, FixedPlan) and self.plan.fixed < self.n_min:
            raise ValueError(
                f"plan fixed: {self.plan.fixed} is under n_min {self.n_min}; no verdict would be possible."
            )
        if self.correction == "dunnett" and not isinstance(self.plan, FixedPlan):
            raise ValueError(
                "correction is dunnett, but the plan is sequential; Dunnett's test looks once: declare "
                "plan: {fixed: n}, or correction: holm."
            )
        return self


Gate = Literal["GO", "NO_GO", "EQUIVALENT", "PASSED", "ARCHIVED"]
"""What a study can be asked to have come to: a verdict on one of its challengers, its own `passes`, or that an arm was
archived on its verdict."""


@explains
class Requirement(Closed):
    """What another study must have come to before this one is started."""

    study: Name
    verdict: Gate
    arm: Name | None = None
    """The challenger that it is about; null: any of them."""


@explains
class Passes(Closed):
    """When the study as a whole has passed: all that is given here must hold."""

    finished: bool = False
    """Every declared run ended with a loss; none diverged or failed."""
    within: Percent | None = None
    """Every challenger's mean loss is shown, at the declared alpha, to be at most this above the baseline's."""
    go: bool = False
    """At least one challenger is GO."""
    control_worse: bool = False
    """A challenger that is GO is shown, at the declared alpha, to be better than every control."""

    @model_validator(mode="after")
    def _asks_something(self) -> Passes:
        if not (self.finished or self.within or self.go or self.control_worse):
            raise ValueError("it asks for nothing; give finished, within, go or control_worse.")
        if self.control_worse and not self.go:
            raise ValueError("control_worse is about the challengers that are GO; give go: true with it.")
        return self


@explains
class Twin(Closed):
    """A rehearsal of a study on another workload: the same arms and rule, fewer seeds, no price, no decision."""

    workload: Name
    seeds: Annotated[int, Field(ge=1, le=MOST_PAIRS, strict=True)] = 3
    """How many, from the study's first."""
    tuning: Name = "untuned"
    """The tuning study that chose the arms' learning rates on the twin's workload, or `untuned`."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Of a tuning study: values to try in place of the study's own, which are made for another model."""


@explains
class ReportedWorkload(Closed):
    """How runs were made that somebody else reports: what is known of it, in place of a workload of params.yaml."""

    model: str
    data: str
    steps: Count
    eval_every: Count
    """Steps between evaluations."""
    stated: dict[str, str | int | float] = {}
    """What else the report states of the setting, in its own words."""

    @property
    def diverged_loss(self) -> None:
        """Not known: no vocabulary is reported, and a reported run that diverged is refused."""
        return None


@explains
class Reported(Closed):
    """Where the results of a study of provenance `reported` are from; the results lie beside study.yaml."""

    source: str
    flaws: list[str] = []
    """What is known to be wrong with these runs, in sentences."""
    workloads: dict[Name, ReportedWorkload]
    """Experiment, as `finals.csv` and `curves.csv` name it -> its setting."""


LATER_KEYS = ("reported", "first_seed", "passes", "selected_from", "twin_of")


@explains
class Study(Closed):
    """A declared comparison or tuning of optimizers on one workload."""

    slug: Name
    question: str
    kind: Literal["comparison", "tuning"] = "comparison"
    provenance: Literal["run", "reported"] = "run"
    reported: Reported | None = None
    """Of provenance `reported`, and only there."""
    workload: Name
    """An entry of params.yaml; of provenance `reported`, the one of `reported.workloads` that is judged."""
    baseline: Name
    challengers: list[Name]
    control: list[Name] = []
    """Arms that are described, not decided, because they test an explanation."""
    reference: list[Name] = []
    """Arms that are described, not decided, because readers know them."""
    seeds: Annotated[list[Seed], Field(min_length=1)]
    first_seed: Seed = 0
    """Of a sequential plan: where its seeds begin. Those of a study that confirms a selection are new ones."""
    decision: Decision | None = None
    passes: Passes | None = None
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """For a tuning study: option -> values, tried by every arm on every seed."""
    price_usd_per_gpu_hour: Annotated[float, Field(ge=0)]
    budget_usd: Annotated[float, Field(ge=0)]
    on_archive: Name | None = None
    """The next method, to which a NO_GO or EQUIVALENT verdict pivots."""
    tuning: Name = "untuned"
    """The tuning study that chose the arms' learning rates, or `untuned`."""
    requires: list[Requirement] = []
    selected_from: Name | None = None
    """The study whose results picked this one's challengers, which are confirmed here on seeds that it did not use."""
    twins: dict[Name, Twin] = {}
    """What `--workload NAME` stands for, by name."""
    twin_of: Name | None = None
    """The study that this one rehearses; set where a twin is made of its declaration, never in a file."""

    @model_validator(mode="after")
    def _declaration_is_whole(self) -> Study:
        arms = self.arms
        for arm in arms:
            if arms.count(arm) > 1:
                raise ValueError(f"the arm {arm!r} is named {arms.count(arm)} times; name each arm once.")
        if len(set(self.seeds)) != len(self.seeds):
            twice = next(s for s in self.seeds if self.seeds.count(s) > 1)
            raise ValueError(f"the seed {twice} stands twice in seeds; name each seed once.")
        if (self.provenance == "reported") != (self.reported is not None):
            raise ValueError(
                f"provenance is {self.provenance!r}, and the key 'reported' is "
                f"{'missing' if self.reported is None else 'there'}; it belongs to provenance reported, and only there."
            )
        if self.reported is not None:
            self._reported_fits(self.reported)
        if self.price_usd_per_gpu_hour > 0 and self.budget_usd == 0:
            raise ValueError(
                f"price_usd_per_gpu_hour is {self.price_usd_per_gpu_hour:g} but budget_usd is 0; "
                "declare the budget of a paid study."
            )
        if self.kind == "tuning":
            if not self.grid:
                raise ValueError("a tuning study needs a grid, like {lr: [0.01, 0.02]}.")
            return self
        if self.grid:
            raise ValueError("grid is for kind: tuning; a comparison compares arms as they are configured.")
        if self.decision is None:
            raise ValueError("a comparison needs a decision with at least min_effect, declared before the first run.")
        if not self.challengers:
            raise ValueError("challengers is empty; name at least one arm to decide on.")
        if self.decision.plan == "sequential":
            first = self.first_seed
            if self.seeds != list(range(first, first + len(self.seeds))):
                raise ValueError(
                    f"seeds are {self.seeds}; a sequential plan uses a prefix of {first}, {first + 1}, {first + 2}, "
                    "... in order, so that no seed can be left out after its result (first_seed says where they begin)."
                )
            if len(self.seeds) > self.decision.n_max:
                raise ValueError(f"{len(self.seeds)} seeds are more than n_max {self.decision.n_max}.")
        elif len(self.seeds) != self.decision.plan.fixed and not self._is_short_twin(self.decision.plan.fixed):
            raise ValueError(
                f"{len(self.seeds)} seeds do not match plan fixed: {self.decision.plan.fixed}; declare as many seeds."
            )
        return self

    def _is_short_twin(self, fixed: int) -> bool:
        """A rehearsal has the rule of its study and fewer seeds than a fixed plan looks at: nothing is decided then."""
        return self.twin_of is not None and len(self.seeds) < fixed

    def _reported_fits(self, reported: Reported) -> None:
        if self.kind != "comparison":
            raise ValueError("kind is 'tuning'; results reported by others can be compared, not tuned.")
        if self.workload not in reported.workloads:
            raise ValueError(
                f"workload is {self.workload!r}, which reported.workloads does not describe; it has "
                f"{', '.join(sorted(reported.workloads))}.{nearest(self.workload, reported.workloads)}"
            )
        if self.seeds != [0]:
            raise ValueError(
                f"seeds are {self.seeds}; reported runs have no recorded seed, so declare seeds: [0] for the one run "
                "an arm (runs with known seeds are for `muon compare`)."
            )

    @property
    def arms(self) -> list[str]:
        """All arms, baseline first, in the order of their declaration."""
        return [self.baseline, *self.challengers, *self.control, *self.reference]

    def role(self, arm: str) -> Role:
        """What the arm is in this study; raises KeyError for an arm that is not in it."""
        if arm == self.baseline:
            return "baseline"
        roles: dict[Role, list[str]] = {
            "challenger": self.challengers,
            "control": self.control,
            "reference": self.reference,
        }
        for role, names in roles.items():
            if arm in names:
                return role
        raise KeyError(arm)

    @property
    def possible_seeds(self) -> list[int]:
        """The seeds that the plan can come to: those declared, and those that a sequential plan may still add."""
        if self.decision is not None and self.decision.plan == "sequential":
            return list(range(self.first_seed, self.first_seed + self.decision.n_max))
        return list(self.seeds)

    def twin(self, name: str) -> Study:
        """The rehearsal that `--workload name` stands for; raises KeyError where none is declared.

        Nothing is paid for it and nothing is decided by it, so that no gate is asked.
        """
        its = self.twins[name]
        return self.model_copy(
            update={
                "grid": {**self.grid, **its.grid},
                "slug": f"{self.slug}-{name}",
                "workload": its.workload,
                "seeds": self.seeds[: its.seeds],
                "tuning": its.tuning,
                "price_usd_per_gpu_hour": 0.0,
                "budget_usd": 0.0,
                "requires": [],
                "on_archive": None,
                "selected_from": None,
                "twins": {},
                "twin_of": self.slug,
            }
        )

    def declaration(self) -> dict[str, Any]:
        """All that must not change after the first result.

        The seeds of a sequential plan are left out: adding the next ones is part of that plan; the twins, too, which
        are studies of their own. A key that came later is left out where it says what its absence has always meant,
        and the hash of such a declaration stays what it was.
        """
        declared = self.model_dump(mode="json", exclude={"twins"})
        for name in LATER_KEYS:
            if getattr(self, name) == type(self).model_fields[name].default:
                del declared[name]
        if self.decision is not None and self.decision.plan == "sequential":
            del declared["seeds"]
        if self.decision is not None and self.decision.correction == "holm":
            del declared["decision"]["correction"]
        return declared

    def registration(self, arms: dict[str, Any]) -> str:
        """SHA-256 of the declaration and of what its arms and workload resolve to (`arms`, plain data)."""
        return sha256_of({"study": self.declaration(), "arms": arms})
