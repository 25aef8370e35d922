"""The order of blocks, the schedule, and the rule of divergence: functions of their arguments alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muonlab.registry.settings import WorkloadSettings
from muonlab.training.data import Order, order_sha256, validation_subset
from muonlab.training.loop import lr_factor, why_diverged

seeds = st.integers(0, 2**31 - 1)
blocks = st.integers(1, 40)
batches = st.integers(1, 9)


@given(seeds, blocks, batches, st.lists(st.integers(0, 30), min_size=1, max_size=6))
def test_a_step_has_its_blocks_whatever_was_asked_before(seed: int, n: int, batch: int, steps: list[int]) -> None:
    order = Order(seed=seed, batch_size=batch, blocks=n)
    for step in steps:
        alone = Order(seed=seed, batch_size=batch, blocks=n).step(step)
        np.testing.assert_array_equal(order.step(step), alone)


@given(seeds, blocks, batches)
def test_every_epoch_holds_every_block_once_in_its_own_permutation(seed: int, n: int, batch: int) -> None:
    order = Order(seed=seed, batch_size=batch, blocks=n)
    steps = math.ceil(3 * n / batch)
    seen = np.concatenate([order.step(step) for step in range(steps)])
    for epoch in range(3):
        expected = np.random.default_rng([seed, epoch]).permutation(n)
        np.testing.assert_array_equal(seen[epoch * n : (epoch + 1) * n], expected)


@given(seeds, blocks, st.sampled_from([1, 2, 3]))
def test_the_sequence_of_blocks_does_not_depend_on_the_batch_size(seed: int, n: int, batch: int) -> None:
    """So 6 steps of one rank and 6/ranks steps of several ranks see the same blocks."""
    whole = Order(seed=seed, batch_size=6, blocks=n).step(0)
    parts = Order(seed=seed, batch_size=batch, blocks=n)
    np.testing.assert_array_equal(np.concatenate([parts.step(i) for i in range(6 // batch)]), whole)


def test_order_hash_differs_by_seed_steps_batch_and_blocks() -> None:
    base = {"seed": 0, "steps": 5, "batch_size": 4, "blocks": 50}
    changes = [{}, {"seed": 1}, {"steps": 6}, {"batch_size": 5}, {"blocks": 51}]
    hashes = [order_sha256(**{**base, **change}) for change in changes]
    assert len(set(hashes)) == len(changes)
    assert hashes[0] == order_sha256(**base)


@given(blocks, st.integers(1, 60))
def test_the_validation_subset_has_no_block_twice(n: int, wanted: int) -> None:
    subset = validation_subset(n, wanted)
    assert len(set(subset.tolist())) == len(subset) == min(n, wanted)
    assert subset.min() >= 0
    assert subset.max() < n


@given(
    st.integers(2, 400).flatmap(lambda steps: st.tuples(st.just(steps), st.integers(0, steps - 1))),
    st.sampled_from(["constant", "cosine"]),
    st.floats(0, 1),
)
def test_schedule_rises_to_one_and_then_never_rises(grid: tuple[int, int], schedule: str, floor: float) -> None:
    steps, warmup = grid
    settings = WorkloadSettings(
        steps=steps, warmup_steps=warmup, schedule=schedule, final_lr_fraction=floor, eval_every=1
    )
    factors = [lr_factor(step, settings) for step in range(steps)]
    assert factors[0] > 0
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert factors[warmup] == pytest.approx(1)
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    if schedule == "constant":
        assert set(factors[warmup:]) == {1.0}
    elif steps - 1 > warmup:
        assert factors[-1] == pytest.approx(floor)


def test_schedule_golden() -> None:
    """By hand: warm-up 1/2, 1; then cosine from 1 over 0.55 to 0.1."""
    settings = WorkloadSettings(steps=5, warmup_steps=2, final_lr_fraction=0.1, eval_every=1)
    assert [lr_factor(step, settings) for step in range(5)] == pytest.approx([0.5, 1, 1, 0.55, 0.1])


finite = st.floats(1, 1.4)


@given(st.lists(finite), st.sampled_from([math.nan, math.inf, None]), st.lists(finite))
def test_a_loss_that_is_not_finite_is_a_divergence(before: list[float], bad: float | None, after: list[float]) -> None:
    assert why_diverged([*before, bad, *after])


@given(st.lists(finite, min_size=1))
def test_losses_within_the_factor_are_none(losses: list[float]) -> None:
    assert why_diverged(losses) is None


@given(st.lists(finite, min_size=1), st.lists(finite), st.lists(finite))
def test_one_peak_is_forgiven_and_two_are_not(a: list[float], b: list[float], c: list[float]) -> None:
    assert why_diverged([*a, 2.2, *b]) is None
    assert why_diverged([*a, 2.2, *b, 2.2, *c])


def test_falling_losses_make_a_return_to_the_start_an_explosion() -> None:
    """The running minimum counts, not the first loss: 7.6 is where an untrained model of 2048 tokens starts."""
    assert why_diverged([7.6, 4.0, 7.6]) is None
    assert why_diverged([7.6, 4.0, 7.6, 7.6])
