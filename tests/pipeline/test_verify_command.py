"""A recorded run that is trained again agrees with its record to the last bit, or a sentence says where it does not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Maker, Repository

pytestmark = pytest.mark.slow

RUN = "runs/exp/current"


@pytest.fixture(scope="module")
def trained(make: Maker, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository with one cell, trained by its stage."""
    repository = make(tmp_path_factory.mktemp("verify") / "repository")
    repository.run("python", "-m", "stages.fingerprint")
    subprocess.run(
        ["python", "-m", "stages.train", "toy", "muon", "0"],
        cwd=repository.root / RUN, env=repository.environment(), check=True, capture_output=True,
    )  # fmt: skip
    return repository


@pytest.fixture
def repository(trained: Repository, tmp_path: Path) -> Repository:
    subprocess.run(["cp", "-a", str(trained.root), str(tmp_path / "repository")], check=True)
    return replace(trained, root=tmp_path / "repository")


def verified(repository: Repository, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and answer of `muon verify`, which leaves nothing behind."""
    before = repository.changed(), len(list(repository.root.rglob("scratch/**/*")))
    done = repository.muon("verify", "exp/current", "--json", *options, check=False)
    after = repository.changed(), len(list(repository.root.rglob("scratch/**/*")))
    assert after == before
    return done.returncode, json.loads(done.stdout)


def edit(repository: Repository, change: Callable[[dict[str, Any]], None]) -> None:
    content = repository.read(f"{RUN}/train.json")
    change(content)
    (repository.root / RUN / "train.json").write_text(json.dumps(content))


def test_a_whole_run_agrees_bit_for_bit_with_its_weights(repository: Repository) -> None:
    code, found = verified(repository)
    assert code == 0, found
    assert (found["agrees"], found["steps"], found["of_steps"], found["rows"]) == (True, 8, 8, 5)
    assert (found["weights_compared"], found["same_environment"], found["tolerance"]) == (True, True, None)


def test_a_record_that_was_edited_does_not_agree(repository: Repository) -> None:
    edit(repository, lambda record: record["hashes"].update(weights="0" * 64))
    code, found = verified(repository)
    assert code == 5
    assert "its final weights hash to" in found["difference"]


def test_the_first_steps_end_at_the_last_row_within_them_and_find_a_last_bit(repository: Repository) -> None:
    code, found = verified(repository, "--steps", "5")
    assert (code, found["steps"], found["rows"], found["weights_compared"]) == (0, 4, 3, False)
    edit(repository, lambda record: record["curve"][2].update(val_loss=record["curve"][2]["val_loss"] * (1 + 1e-15)))
    code, found = verified(repository, "--steps", "5")
    assert code == 5
    assert "at step 4 val_loss is" in found["difference"]


def test_in_another_environment_the_losses_have_a_tolerance(repository: Repository) -> None:
    """The record claims another machine; its digest is that machine's."""
    repository.run(
        "python", "-c",
        "import json; from pathlib import Path; from muonlab.pipeline.layout import Layout\n"
        "from muonlab.pipeline.resolve import load_params, resolve_cell; from muonlab.registry.cell import Cell\n"
        "layout = Layout.find(); cell = resolve_cell(layout, load_params(layout.params), 'toy', 'muon', 0)\n"
        "inputs = {**cell.inputs.model_dump(), 'environment': 'e' * 64}\n"
        f"path = Path('{RUN}/train.json'); record = json.loads(path.read_text())\n"
        "record['hashes']['environment'] = 'e' * 64\n"
        "record['cell_digest'] = Cell.model_validate({**cell.model_dump(mode='json'), 'inputs': inputs}).digest\n"
        "for point in record['curve']: point['val_loss'] *= 1.009\n"
        "path.write_text(json.dumps(record))",
    )  # fmt: skip
    code, found = verified(repository, "--steps", "2")
    assert (code, found["same_environment"], found["tolerance"]) == (0, False, 0.01)
    edit(repository, lambda record: record["curve"][1].update(val_loss=record["curve"][1]["val_loss"] * 1.02))
    assert verified(repository, "--steps", "2")[0] == 5


@pytest.mark.parametrize("change", [{"repeats": "to rounding: CUDA"}, {"device_count": 2}, {"computing": None}])
def test_a_record_that_promises_agreement_to_rounding_is_held_to_no_more(
    repository: Repository, change: dict[str, Any]
) -> None:
    def claim(record: dict[str, Any]) -> None:
        if "repeats" in change:
            record["computing"].update(change)
        else:
            record.update(change)
        record["hashes"]["weights"] = "0" * 64
        record["val_loss"] *= 1.009

    edit(repository, claim)
    code, found = verified(repository)
    assert (code, found["same_environment"], found["tolerance"], found["weights_compared"]) == (0, True, 0.01, False)
    edit(repository, lambda record: record.update(val_loss=record["val_loss"] * 1.02))
    done = repository.muon("verify", "exp/current", check=False)
    assert done.returncode == 5
    assert "within 1% (the record promises agreement to rounding only): its final loss is" in done.stdout


@pytest.mark.parametrize(
    ("run", "steps", "change", "words"),
    [
        ("exp/nolah-7", "2", None, "there is no record of such a run"),
        ("../exp/current", "2", None, "there is no record of such a run"),
        ("exp/current", "1", None, "its first is at step 2"),
        ("exp/current", "2", ("optimizers", "muon", "momentum"), "gives muon other options"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(
    repository: Repository, run: str, steps: str, change: tuple[str, str, str] | None, words: str
) -> None:
    if change is not None:
        above, arm, option = change
        repository.edit_yaml("params.yaml", lambda params: params[above][arm].update({option: 0.5}))
    done = repository.muon("verify", run, "--steps", steps, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr
