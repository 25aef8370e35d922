"""The measured error of every verdict beside its promise, one kind of noise at a time.

    GO is wrong                    at effect 0, min_effect -> 0 (the hardest setting; above 0 it only gets rarer)
    NO_GO or EQUIVALENT is wrong   at effect = min_effect       (together they are B's rejections, at any min_effect)
    EQUIVALENT is wrong            at effect = -min_effect      (rarer for a small min_effect: a wide one is taken)
    a confidence sequence is wrong where the true effect is outside at any n

A study errs if any of its looks does, whether or not it would have stopped before; a family, if any of its arms does.
Noise has mean 0 and, but for the family and the divergences, sd 1. Promises are the protocol's at alpha 0.05 and scale
with alpha. Skewed noise has none: where bad challenger seeds are rare, no method protects the mean.
Shape letters: S = studies, n = pairs, J = challengers, L = looks.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from muonlab.registry.verdict import Verdict
from muonlab.stats.evidence import Floats, critical_t
from muonlab.stats.kernel import Bools, Cache, is_last_look
from muonlab.stats.result import Result
from muonlab.stats.rule import N_LIMIT, Rule
from muonlab.stats.simulate import Rate, centred, chunks, looks_of, moments_after, rate_of, verdicts

NARROW, WIDE = 0.5, 3.0  # min_effect, in the noise's sd
SEQUENCE_LEVEL = 0.05  # each side: a 90 % confidence sequence
RAISED_BY = 8  # pairs by which an amended plan goes on
DIVERGENCE_RATE = 0.1
DIVERGED_SD = 100.0  # ln(vocabulary size) is far from a converged loss, in sd of a difference
FAMILY_SD = (0.3, 1.0, 3.0)
ERRORS = 2.0  # Monte Carlo standard errors within which an excess shows nothing

Wrong = Literal["GO", "NO_GO or EQUIVALENT", "EQUIVALENT", "confidence sequence"]
Outcome = Literal["kept", "within error", "broken", "not promised"]
Shape = tuple[int, int]

AS_THE_RULE, AMENDED, FAMILY = 1.04, 0.7, 1.1
"""Promised error over alpha: at alpha 0.05, 5.2 %, 3.5 % and 5.5 %."""


@dataclass(frozen=True)
class Noise:
    """Differences [S, n, J] where there is no effect, and which runs diverged, if any may."""

    d: Floats
    baseline_diverged: Bools | None = None
    challenger_diverged: Bools | None = None


@dataclass(frozen=True)
class Null:
    """A kind of noise, and what a researcher without an effect does with it."""

    name: str
    about: str
    draw: Callable[[np.random.Generator, Shape], Noise]
    promises: dict[Wrong, float]
    """Promised error over alpha."""
    why_none: str = ""
    """Why the other errors have no promise."""
    n_min: int | None = None
    amended: bool = False
    raised_by: int = 0
    """Pairs added, by an amendment, to a plan that has ended."""

    def stages(self, rule: Rule, at_hand: int) -> list[tuple[Rule, NDArray[np.int_]]]:
        """The rules that decide one after the other, each with the looks [L] that it has."""
        first = rule.model_copy(update={"n_min": self.n_min or rule.n_min, "amended": self.amended or rule.amended})
        looks = looks_of(first, at_hand)
        last = min(int(looks[-1]) + self.raised_by, N_LIMIT)
        if last == looks[-1]:
            return [(first, looks)]
        fixed_n = None if rule.plan == "sequential" else last
        second = first.model_copy(update={"amended": True, "n_max": max(last, rule.n_max), "fixed_n": fixed_n})
        later = np.arange(looks[-1] + 1, last + 1) if rule.plan == "sequential" else np.array([last])
        return [(first, looks), (second, later)]


class ErrorRate(Result):
    """How often one verdict was wrong, and how often it may be."""

    wrong: Wrong
    setting: str
    rate: Rate
    promise: float | None
    outcome: Outcome


class Calibration(Result):
    """The measured errors of a rule under one null."""

    null: str
    about: str
    studies: int
    seed: int
    errors: tuple[ErrorRate, ...]


def _normal(rng: np.random.Generator, shape: Shape) -> Noise:
    return Noise(rng.standard_normal((*shape, 1)))


def _t3(rng: np.random.Generator, shape: Shape) -> Noise:
    return Noise(rng.standard_t(3, (*shape, 1)) / np.sqrt(3))


def _left_skewed(rng: np.random.Generator, shape: Shape) -> Noise:
    return Noise(1 - rng.exponential(size=(*shape, 1)))


def _right_skewed(rng: np.random.Generator, shape: Shape) -> Noise:
    return Noise(rng.exponential(size=(*shape, 1)) - 1)


def _unequal_family(rng: np.random.Generator, shape: Shape) -> Noise:
    shared = rng.standard_normal((*shape, 1))
    return Noise(shared - rng.standard_normal((*shape, len(FAMILY_SD))) * np.array(FAMILY_SD))


def _diverging(rng: np.random.Generator, shape: Shape) -> Noise:
    d = rng.standard_normal((*shape, 1))
    baseline, challenger = (rng.random(d.shape) < DIVERGENCE_RATE for _ in range(2))
    # A diverged run counts with the diverged loss, and two of them cancel: intention to treat.
    d = np.where(baseline == challenger, np.where(baseline, 0.0, d), np.where(baseline, DIVERGED_SD, -DIVERGED_SD))
    return Noise(d, baseline, challenger)


_ALL: tuple[Wrong, ...] = ("GO", "NO_GO or EQUIVALENT", "EQUIVALENT")


def _promising(factor: float) -> dict[Wrong, float]:
    return dict.fromkeys(_ALL, factor)


SKEWED = "no method protects the mean where the tail is on one side; the divergence gate is the guard"
NULLS = (
    Null("normal", "normal noise", _normal, _promising(AS_THE_RULE)),
    Null("t3", "heavy tails: Student's t with 3 degrees of freedom", _t3, _promising(AS_THE_RULE)),
    Null("skewed left", "rare bad challenger seeds: 1 - exponential", _left_skewed, {}, SKEWED),
    Null("skewed right", "rare bad baseline seeds: exponential - 1", _right_skewed, {}, SKEWED),
    Null(
        "unequal family",
        "3 challengers of run-sd 0.3, 1 and 3 share a baseline of run-sd 1; an error of any arm counts",
        _unequal_family,
        _promising(FAMILY),
    ),
    Null(
        "early looks", "normal noise, looked at from the second pair on", _normal, _promising(AS_THE_RULE), n_min=2
    ),
    Null(
        "amended", "normal noise, plan amended after a result: the e-process alone", _normal, _promising(AMENDED),
        amended=True,
    ),
    Null(
        "plan raised",
        f"normal noise, {RAISED_BY} pairs added by an amendment after the planned end",
        _normal,
        {},
        "alpha was spent when the plan first ended; the verdict says `plan amended`",
        raised_by=RAISED_BY,
    ),
    Null(
        "divergence",
        f"every run diverges with chance {DIVERGENCE_RATE:g}, in both arms; else normal noise",
        _diverging,
        {"GO": AS_THE_RULE, "EQUIVALENT": AS_THE_RULE},
        "more divergences than the baseline at the last pair are a NO_GO by rule, whatever the mean",
    ),
)  # fmt: skip


def resampled(differences: Floats) -> Null:
    """Noise drawn with replacement, seed by seed, from differences [n] or [n, J], centred and of sd 1 in each arm.

    Raises ValueError as `simulate.centred` does.
    """
    pool = centred(differences)
    n, arms = pool.shape

    def draw(rng: np.random.Generator, shape: Shape) -> Noise:
        return Noise(pool[rng.integers(n, size=shape)])

    about = f"noise drawn from {n} observed pairs of {arms} challenger{'s' if arms > 1 else ''}"
    return Null("own noise", about, draw, {}, f"{n} pairs are a rough picture of the noise")


def measure(
    null: Null,
    rule: Rule,
    *,
    family_size: int | None = None,
    studies: int = 100_000,
    seed: int = 0,
    cache: Cache | None = None,
) -> Calibration:
    """The errors of `rule` in `studies` simulated studies of `null`, at a min_effect on the noise's scale.

    A fixed plan that takes the pairs at hand has n_max of them. family_size: declared challengers, by default those
    that the null has. Deterministic for a seed, whatever other nulls are measured.
    """
    stages = null.stages(rule, rule.n_max)
    last = int(stages[-1][1][-1])
    rng = np.random.default_rng([seed, zlib.crc32(null.name.encode())])
    settings = _settings()
    counts = dict.fromkeys(settings, 0)
    outside = 0
    for size in chunks(studies):
        noise = null.draw(rng, (size, last))
        for wrong, (_, effect, margin, named) in settings.items():
            errs = np.zeros(size, dtype=bool)
            for stage, looks in stages:
                said = _verdicts(noise, effect, margin, stage, looks, family_size or noise.d.shape[-1], cache)
                errs |= np.logical_or.reduce([said == verdict for verdict in named]).any(axis=(1, 2))
            counts[wrong] += int(errs.sum())
        has_sequence = noise.d.shape[-1] == 1 and noise.baseline_diverged is None
        if has_sequence:
            outside += int(_leaves_sequence(noise.d, rule.g).sum())
    errors = [
        _error(null, wrong, setting, counts[wrong], studies, null.promises.get(wrong), rule.alpha)
        for wrong, (setting, *_) in settings.items()
    ]
    if has_sequence:
        promise = 1.0 if "GO" in null.promises else None
        setting = f"90% confidence sequence, at any of {last} pairs"
        errors.append(_error(null, "confidence sequence", setting, outside, studies, promise, 2 * SEQUENCE_LEVEL))
    return Calibration(null=null.name, about=null.about, studies=studies, seed=seed, errors=tuple(errors))


def _settings() -> dict[Wrong, tuple[str, float, float, tuple[str, ...]]]:
    """Of each error: its setting in words, effect and min_effect in the noise's sd, and the verdicts that are wrong."""
    archive = (Verdict.NO_GO.value, Verdict.EQUIVALENT.value)
    return {
        "GO": ("effect 0, min_effect -> 0", 0.0, 0.0, (Verdict.GO.value,)),
        "NO_GO or EQUIVALENT": (f"effect = min_effect = {NARROW:g} sd", NARROW, NARROW, archive),
        "EQUIVALENT": (f"effect = -min_effect = -{WIDE:g} sd", -WIDE, WIDE, (Verdict.EQUIVALENT.value,)),
    }


def _verdicts(
    noise: Noise,
    effect: float,
    margin: float,
    rule: Rule,
    looks: NDArray[np.int_],
    family_size: int,
    cache: Cache | None,
) -> NDArray[np.str_]:
    if noise.baseline_diverged is None or noise.challenger_diverged is None:
        return verdicts(noise.d + effect, margin, rule, looks, family_size=family_size, cache=cache)
    theirs, ours = (
        np.cumsum(diverged, axis=1)[:, looks - 1] for diverged in (noise.baseline_diverged, noise.challenger_diverged)
    )
    return verdicts(
        noise.d + effect,
        margin,
        rule,
        looks,
        family_size=family_size,
        unstable=(ours > theirs) & is_last_look(looks, rule)[:, np.newaxis],
        blocked=ours > 0,
        cache=cache,
    )


def _leaves_sequence(d: Floats, g: float) -> Bools:
    """Whether 0, the truth, is outside the 90 % confidence sequence of d [S, n, 1] at any n; [S]."""
    n = np.arange(1, d.shape[1] + 1)
    limits = [critical_t(int(k), SEQUENCE_LEVEL, g) for k in n]
    bounded = n[[limit is not None for limit in limits]]
    mean, ss = moments_after(d, bounded)
    limit = np.array([x for x in limits if x is not None])[:, np.newaxis]
    half = limit * np.sqrt(ss / (bounded - 1)[:, np.newaxis] / bounded[:, np.newaxis])
    return np.asarray((np.abs(mean) > half).any(axis=(1, 2)))


def _error(
    null: Null, wrong: Wrong, setting: str, count: int, studies: int, factor: float | None, level: float
) -> ErrorRate:
    rate = rate_of(count, studies)
    if factor is None:
        return ErrorRate(
            wrong=wrong,
            setting=setting,
            rate=rate,
            promise=None,
            outcome="not promised",
            undefined={"promise": null.why_none},
        )
    promise = factor * level
    outcome: Outcome = "kept" if rate.value <= promise else "within error"
    if rate.value > promise + ERRORS * rate.standard_error:
        outcome = "broken"
    return ErrorRate(wrong=wrong, setting=setting, rate=rate, promise=promise, outcome=outcome)
