"""A real repository with a workload of toy size: the project's own files, its own git history, its own DVC.

`make_repository` copies the working tree's project files into a temporary folder, replaces params.yaml and the
study by ones that train in seconds, and commits. Commands run there as a user runs them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).parents[2]
STUDY = "001-toy"

TOY_PARAMS: dict[str, Any] = {
    "optimizer": "muon",
    "seed": 0,
    "workload": "toy",
    "study": STUDY,
    "optimizers": {
        "muon": {"kind": "muon", "orthogonalizer": "gram_eigh"},
        "nolah": {"kind": "nolah", "scale": 0.90, "orthogonalizer": "gram_eigh"},
    },
    "workloads": {
        "toy": {
            "settings": {
                "data": {"max_documents": 6, "vocab_size": 300, "sequence_length": 32},
                "model": {
                    "hidden_size": 16,
                    "layers": ["mamba", "attention"],
                    "attention_heads": 2,
                    "key_value_heads": 1,
                    "mamba_d_head": 16,
                    "mamba_d_state": 4,
                    "mamba_chunk_size": 16,
                    "mlp_size": 16,
                },
                "steps": 8,
                "batch_size": 2,
                "warmup_steps": 1,
                "eval_every": 2,
                "eval_blocks": 2,
                "checkpoint_every": 2,
                "sample_tokens": 4,
            },
            "tuned": {"muon": {"lr": 0.02}, "nolah": {"lr": 0.02}},
        }
    },
}

TOY_STUDY: dict[str, Any] = {
    "slug": STUDY,
    "question": "Does NOLAH beat Muon on a toy?",
    "workload": "toy",
    "baseline": "muon",
    "challengers": ["nolah"],
    "seeds": [0, 1],
    "decision": {"min_effect": "0.5%"},
    "price_usd_per_gpu_hour": 0,
    "budget_usd": 0,
    "on_archive": "muon",
}


@dataclass(frozen=True)
class Repository:
    """A repository under test, and how to run commands in it."""

    root: Path
    tracking: bool = False
    """Whether MLflow is shown what happens; it costs seconds that most tests need not spend."""

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command as a user with the environment activated would."""
        done = subprocess.run(
            command, cwd=self.root, env=self.environment(**environment), capture_output=True, text=True, check=False
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    def environment(self, **changes: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "PYTEST_", "PYTHONPATH"))}
        return {
            **kept,
            # The stages call `python`: it must be the one that runs the tests.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.root),
            "DVC_NO_ANALYTICS": "true",
            "OMP_NUM_THREADS": "1",
            **({} if self.tracking else {"MUONLAB_TRACKING": "off"}),
            **changes,
        }

    def muon(self, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "muonlab.cli", *arguments, check=check, **environment)

    def dvc(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "dvc", *arguments, check=check)

    def git(self, *arguments: str) -> str:
        return self.run("git", *arguments).stdout

    def changed(self, *options: str) -> list[str]:
        """What is not as committed, ignored files included, but what Python compiles for itself."""
        lines = self.git("status", "--porcelain", "--ignored", *options).splitlines()
        return sorted(line for line in lines if "__pycache__" not in line)

    def commit(self, message: str = "change") -> None:
        self.git("add", "-A")
        self.git("commit", "-qm", message)

    def attempts(self) -> list[dict[str, Any]]:
        """Records of every attempt that has ended on this machine: the count of what was really trained."""
        found = sorted(self.root.glob("scratch/*/attempts/*/record.json"))
        return [json.loads(path.read_text()) for path in found]

    def ledger(self) -> list[dict[str, Any]]:
        path = self.root / "experiments" / "ledger.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def read(self, path: str) -> Any:
        text = (self.root / path).read_text()
        return yaml.safe_load(text) if path.endswith(".yaml") else json.loads(text)

    def edit_yaml(self, path: str, change: Callable[[Any], None]) -> None:
        content = self.read(path)
        change(content)
        (self.root / path).write_text(yaml.safe_dump(content, sort_keys=False))


def make_repository(
    root: Path, *, params: dict[str, Any] | None = None, study: dict[str, Any] | None = None
) -> Repository:
    """Make a committed repository with the toy workload (or these params and this study) in `root`."""
    root.mkdir(parents=True)
    for name in ("muonlab", "optim", "stages", ".dvc/config", ".dvc/.gitignore", ".dvc/plots", "data/dvc.yaml",
                 "data/.gitignore", "dvc.yaml", ".gitignore", ".dvcignore", "runs/exp/current/.gitkeep",
                 "reports/exp/.gitkeep"):  # fmt: skip
        source, target = PROJECT / name, root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copyfile(source, target)
    for name in ("runs/exp/current/.gitignore", "reports/exp/.gitignore"):
        if (PROJECT / name).exists():
            shutil.copyfile(PROJECT / name, root / name)
    study = study or TOY_STUDY
    (root / "params.yaml").write_text(yaml.safe_dump(params or TOY_PARAMS, sort_keys=False))
    folder = root / "experiments" / study["slug"]
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(yaml.safe_dump({"study": study}, sort_keys=False))
    repository = Repository(root)
    repository.run(
        sys.executable, "-c",
        "from muonlab.pipeline import doors; from muonlab.pipeline.layout import Layout\n"
        "from muonlab.pipeline.resolve import load_study\n"
        f"layout = Layout.find(); study = load_study(layout, {study['slug']!r})\n"
        "doors.write_grid(layout, study); doors.set_open_studies(layout, [study.slug])",
    )  # fmt: skip
    repository.git("init", "-q")
    repository.git("config", "user.name", "n")
    repository.git("config", "user.email", "n@example.org")
    repository.commit("toy")
    return repository


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every toy repository would make for itself: prepared data in DVC's cache, and an empty MLflow store."""
    template = make_repository(tmp_path_factory.mktemp("template") / "repository")
    template.dvc("repro", "data/dvc.yaml:prepare_data@toy")
    template.run(
        sys.executable, "-c",
        "from pathlib import Path; from muonlab.tracking import tracking_uri\n"
        "from mlflow.tracking import MlflowClient\n"
        "MlflowClient(tracking_uri(Path.cwd())).search_experiments()",
    )  # fmt: skip
    return template.root


Maker = Callable[..., Repository]


@pytest.fixture(scope="session")
def make(prepared: Path) -> Maker:
    """Make a toy repository that has its data already: `make(path, params=..., study=...)`."""

    def made(root: Path, *, tracking: bool = False, **changes: Any) -> Repository:
        repository = replace(make_repository(root, **changes), tracking=tracking)
        for name in (".dvc/cache", "data/toy", "data/dvc.lock", "mlflow.db"):
            repository.run("cp", "-a", str(prepared / name), str(root / name))
        repository.commit("prepared")
        return repository

    return made


@pytest.fixture
def repository(make: Maker, tmp_path: Path) -> Repository:
    """A fresh toy repository."""
    return make(tmp_path / "repository")
