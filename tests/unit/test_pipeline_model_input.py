"""A cell that starts from a model of others is another cell where that model is another one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_pipeline_parts import install

from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import load_params, resolve_cell
from muonlab.registry.cell import Cell
from muonlab.registry.errors import UsageError

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A repository whose workload `tiny` can start from a folder; fingerprint and data are made up."""
    found = Layout(root=tmp_path, main=tmp_path)
    found.fingerprint("muon").parent.mkdir(parents=True)
    found.fingerprint("muon").write_text(json.dumps({"code": "c", "environment": "e"}))
    found.data("tiny").mkdir(parents=True)
    (found.data("tiny") / "meta.json").write_text(json.dumps({"sha256": {"tokens": "d", "tokenizer": "t"}}))
    return found


def cell(layout: Layout, **model: object) -> Cell:
    """The cell of Muon on `tiny`, started from `model`; without one, from a model built here."""
    content = yaml.safe_load((PROJECT / "params.yaml").read_text())
    if model:
        content["workloads"]["tiny"]["settings"]["model"] = model
    layout.params.write_text(yaml.safe_dump(content, sort_keys=False))
    return resolve_cell(layout, load_params(layout.params), "tiny", "muon", 0)


def save(folder: Path, **files: bytes) -> None:
    """A model: its files by name, `__` for a dot."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in {"config__json": b"{}", "model__safetensors": b"weights", **files}.items():
        (folder / name.replace("__", ".")).write_bytes(content)


@pytest.mark.parametrize(
    "files",
    [
        {"config__json": b"[]"},
        {"model__safetensors": b"weighty"},
        {"model-2__safetensors": b""},
        {"model__safetensors__index__json": b"{}"},
    ],
)
def test_two_models_saved_into_one_folder_are_two_cells(layout: Layout, files: dict[str, bytes]) -> None:
    folder = layout.root / "models" / "own"
    save(folder)
    first = cell(layout, pretrained="models/own")
    save(folder, README__md=b"words")
    assert cell(layout, pretrained="models/own").digest == first.digest
    save(folder, **files)
    assert cell(layout, pretrained="models/own").digest != first.digest


def test_where_weights_are_drawn_anew_those_of_the_folder_do_not_count(layout: Layout) -> None:
    folder = layout.root / "models" / "own"
    save(folder)
    first = cell(layout, pretrained="models/own", start="random")
    save(folder, model__safetensors=b"others")
    assert cell(layout, pretrained="models/own", start="random").digest == first.digest
    save(folder, config__json=b"[]")
    assert cell(layout, pretrained="models/own", start="random").digest != first.digest


def test_a_folder_that_git_does_not_hold_is_found_beside_dvcs_temporary_copy(layout: Layout, tmp_path: Path) -> None:
    save(layout.root / "models" / "own")
    here = cell(layout, pretrained="models/own")
    copy = Layout(root=tmp_path / "copy", main=layout.main)
    shutil.copytree(layout.root / "data", copy.root / "data")
    assert cell(copy, pretrained="models/own").digest == here.digest


def test_of_a_package_the_version_counts(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="is not installed"):
        cell(layout, pretrained="package:a-model-of-ours")
    found = []
    for version in ("1.0", "1.1"):
        install(tmp_path / version, monkeypatch, "a-model-of-ours", version)
        found.append(cell(layout, pretrained="package:a-model-of-ours"))
    assert [each.inputs.model for each in found] == ["1.0", "1.1"]
    assert found[0].digest != found[1].digest


def test_a_commit_of_the_hub_and_a_model_built_here_are_told_by_the_settings(layout: Layout) -> None:
    assert cell(layout).inputs.model == ""
    assert cell(layout, pretrained="someone/something", revision="0" * 40).inputs.model == ""


def test_a_missing_folder_and_one_without_a_configuration_are_refused_in_a_sentence(layout: Layout) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        cell(layout, pretrained="./models/own")
    (layout.root / "models" / "own").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"holds no config\.json; save the model"):
        cell(layout, pretrained="models/own")


def test_a_large_file_is_hashed_once(layout: Layout) -> None:
    """A gigabyte of nothing: a second to hash, and every seed and arm of a plan asks for it."""
    folder = layout.root / "models" / "own"
    save(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2**30)
    cell(layout, pretrained="models/own")
    params = load_params(layout.params)
    began = time.process_time()
    for seed in range(20):
        resolve_cell(layout, params, "tiny", "muon", seed)
    assert time.process_time() - began < 0.3


def test_neither_planning_nor_taking_over_a_cell_loads_torch(layout: Layout) -> None:
    save(layout.root / "models" / "own")
    cell(layout, pretrained="models/own")
    code = (
        "import sys; from pathlib import Path; from muonlab.pipeline.cells import started_ranks\n"
        "from muonlab.pipeline.layout import Layout; from muonlab.pipeline.resolve import load_params, resolve_cell\n"
        "layout = Layout(root=Path(sys.argv[1]), main=Path(sys.argv[1])); params = load_params(layout.params)\n"
        "assert resolve_cell(layout, params, 'tiny', 'muon', 0).inputs.model and started_ranks().writes\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(layout.root)], cwd=PROJECT, check=True)
