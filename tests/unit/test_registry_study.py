"""A declaration is either whole and consistent, or refused in one sentence that says where and what is allowed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from muonlab.registry.errors import UsageError, explain
from muonlab.registry.settings import Params, WorkloadSettings
from muonlab.registry.study import Study
from muonlab.registry.yamlfile import read_yaml

REPOSITORY = Path(__file__).parents[2]
DEFAULT = yaml.safe_load((REPOSITORY / "experiments/001-nolah-vs-muon-tiny/study.yaml").read_text())["study"]


def declare(**changes: object) -> Study:
    content = copy.deepcopy(DEFAULT)
    for key, value in changes.items():
        if key in content["decision"]:
            content["decision"][key] = value
        else:
            content[key] = value
    return Study.model_validate(content)


def refusal(**changes: object) -> str:
    with pytest.raises(ValidationError) as caught:
        declare(**changes)
    return str(explain(caught.value, "study.yaml", prefix="study"))


def test_default_study_is_what_the_issue_declares() -> None:
    study = declare()
    assert study.arms == ["muon", "nolah", "orthonoise", "isotropic", "adamw"]
    assert [study.role(arm) for arm in study.arms] == ["baseline", "challenger", "challenger", "control", "reference"]
    assert study.decision is not None
    assert (study.decision.n_max, study.decision.alpha, study.decision.plan) == (12, 0.05, "sequential")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": []}, ["study.seeds", "at least 1"]),
        ({"seeds": [0, -1]}, ["study.seeds.1", "-1", "greater than or equal to 0"]),
        ({"seeds": [0, "1"]}, ["study.seeds.1", "'1'", "integer"]),
        ({"seeds": [0, 0]}, ["seed 0 stands twice"]),
        ({"seeds": [1, 2]}, ["prefix of 0, 1, 2"]),
        ({"seeds": list(range(13))}, ["13 seeds", "n_max 12"]),
        ({"challengers": ["nolah", "nolah"]}, ["'nolah' is named 2 times"]),
        ({"challengers": ["muon"]}, ["'muon' is named 2 times"]),
        ({"challengers": []}, ["challengers is empty"]),
        ({"baseline": "../etc"}, ["study.baseline", "'../etc'", "pattern"]),
        ({"slug": "A b"}, ["study.slug"]),
        ({"min_effect": None}, ["min_effect", "percentage"]),
        ({"min_effect": "-1%"}, ["min_effect"]),
        ({"min_effect": "101%"}, ["between 0% and 100%"]),
        ({"min_effect": -0.1}, ["positive"]),
        ({"min_effect": True}, ["percentage"]),
        ({"n_max": 3}, ["n_max is 3, under n_min 4"]),
        ({"alpha": 0.7}, ["study.decision.alpha", "0.7", "less than 0.5"]),
        ({"plan": {"fixed": 4}}, ["5 seeds do not match plan fixed: 4"]),
        ({"price_usd_per_gpu_hour": 2.8}, ["budget"]),
        ({"decision": {"min_effect": "1%", "correction": "dunnett"}}, ["plan is sequential", "plan: {fixed: n}"]),
        ({"decision": {"min_effect": "1%", "correction": "tukey"}}, ["correction", "'tukey'", "'dunnett'"]),
        ({"challenger": ["nolah"]}, ["unknown key 'study.challenger'", "'challengers'"]),
        ({"grid": {"lr": [1]}}, ["kind: tuning"]),
    ],
)
def test_wrong_declaration_is_refused_in_a_sentence(changes: dict[str, object], words: list[str]) -> None:
    said = refusal(**changes)
    assert said.startswith("study.yaml: ")
    assert "\n" not in said
    for word in words:
        assert word in said


def test_a_missing_key_is_named() -> None:
    content = {key: value for key, value in DEFAULT.items() if key != "baseline"}
    with pytest.raises(ValidationError) as caught:
        Study.model_validate(content)
    assert "'study.baseline' is missing" in str(explain(caught.value, "study.yaml", prefix="study"))


@given(st.integers(min_value=1, max_value=12))
def test_adding_the_next_seeds_of_a_sequential_plan_keeps_the_registration(seeds: int) -> None:
    assert declare(seeds=list(range(seeds))).registration({}) == declare().registration({})


@pytest.mark.parametrize(
    "change",
    [
        {"min_effect": "0.4%"},
        {"alpha": 0.04},
        {"n_max": 13},
        {"challengers": ["orthonoise"]},
        {"question": "?"},
        {"g": 1},
    ],
)
def test_any_other_change_is_another_registration(change: dict[str, object]) -> None:
    assert declare(**change).registration({}) != declare().registration({})


def test_holm_is_what_a_declaration_without_the_key_means() -> None:
    fixed = {"min_effect": "0.5%", "plan": {"fixed": 5}}
    said = {name: declare(decision={**fixed, "correction": name}).registration({}) for name in ("holm", "dunnett")}
    assert said["holm"] == declare(decision=fixed).registration({})
    # The key is younger than declarations without it, whose hash it must not change.
    assert "correction" not in declare(decision=fixed).declaration()["decision"]
    assert said["holm"] != said["dunnett"]


def test_what_an_arm_stands_for_is_part_of_the_registration() -> None:
    study = declare()
    assert study.registration({"nolah": {"scale": 0.9}}) != study.registration({"nolah": {"scale": 0.95}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, ["steps", "0", "greater than 0"]),
        ({"steps": "300"}, ["steps", "'300'", "integer"]),
        ({"warmup_steps": 300}, ["warmup_steps is 300", "300 steps"]),
        ({"eval_every": 301}, ["eval_every is 301"]),
        ({"hessian_steps": [100, 301]}, ["hessian_steps holds 301", "300 steps"]),
        ({"stepz": 3}, ["unknown key 'settings.stepz'", "Did you mean 'steps'?"]),
        ({"data": {"vocab_sise": 3}}, ["unknown key 'settings.data.vocab_sise'", "'vocab_size'"]),
        ({"model": {"layers": ["attention", "rnn"]}}, ["settings.model.layers.1", "'rnn'", "'mamba'"]),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence(change: dict[str, object], words: list[str]) -> None:
    settings = yaml.safe_load((REPOSITORY / "params.yaml").read_text())["workloads"]["tiny"]["settings"]
    with pytest.raises(ValidationError) as caught:
        WorkloadSettings.model_validate({**settings, **change})
    said = str(explain(caught.value, "params.yaml", prefix="settings"))
    assert "\n" not in said
    for word in words:
        assert word in said


def test_params_refuse_a_bad_name_of_an_optimizer() -> None:
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    params["optimizers"]["../../x"] = {"kind": "muon"}
    with pytest.raises(ValidationError):
        Params.model_validate(params)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x [1]\nb: *x\n", ["aliases"]),
        ("a: 1\na: 2\n", ["'a' stands twice"]),
        ("- 1\n", ["expected a mapping"]),
        ("a: [1\n", ["line"]),
        ("a: !!python/object/apply:os.system ['true']\n", ["could not determine a constructor"]),
    ],
)
def test_yaml_that_no_declaration_needs_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_yaml(path, where="study.yaml")
    for word in words:
        assert word in str(caught.value)


def test_huge_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    with pytest.raises(UsageError, match="cannot be read"):
        read_yaml(path)
    path.write_bytes(b"a: 1\n" * 300_000)
    with pytest.raises(UsageError, match="at most"):
        read_yaml(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="UTF-8"):
        read_yaml(path)
