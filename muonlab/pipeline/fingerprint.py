"""Fingerprints of the code and the environment that can change a run's result.

    code        = SHA-256 over the syntax trees, without docstrings, of the trainer, the core of `optim/`, the
                  optimizer's own file and the schema of settings with its defaults: a comment changes nothing, a new
                  optimizer changes no other's
    environment = SHA-256 over the versions of Python, the numerical libraries and their kernels for CUDA, the
                  processor's architecture and the accelerator that torch computes on

DVC's dependencies and a cell's digest both read the files that this writes, so they are one list.
Nothing heavy is imported: a fingerprint takes a fraction of a second.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
from pathlib import Path

from muonlab.pipeline.gpus import training_accelerator
from muonlab.pipeline.layout import Layout
from muonlab.registry.canonical import sha256_of
from muonlab.registry.files import write_atomically
from muonlab.registry.settings import Params
from muonlab.registry.syntax import syntax_sha256

LIBRARIES = ("numpy", "safetensors", "scipy", "torch", "transformers")
KERNELS = ("causal_conv1d", "mamba_ssm")
"""What transformers computes Mamba layers with on CUDA, where it is installed: other sums than its own code makes."""


def write_fingerprints(layout: Layout, params: Params) -> None:
    """Write data/fingerprint/<optimizer>.json for every optimizer named in params.yaml."""
    around = environment()
    for arm, options in params.optimizers.items():
        kind = str(options.get("kind", arm))
        content = {
            "kind": kind,
            "code": code_fingerprint(layout.root, kind),
            "environment": sha256_of(around),
            "environment_versions": around,
        }
        path = layout.fingerprint(arm)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content, indent=2) + "\n", durable=False)


def code_files(root: Path, kind: str) -> list[Path]:
    """Source files whose code can change a run of the optimizer `kind`, sorted."""
    declared = [root / "muonlab" / "registry" / name for name in ("cell.py", "settings.py")]
    shared = [root / "optim" / "__init__.py", root / "optim" / f"{kind}.py", *declared]
    folders = [root / "optim" / "core", root / "muonlab" / "training"]
    return sorted([*shared, *(path for folder in folders for path in folder.rglob("*.py"))])


def code_fingerprint(root: Path, kind: str) -> str:
    """SHA-256 (hex) of the program that trains with the optimizer `kind`, without comments and docstrings."""
    return sha256_of(
        {str(path.relative_to(root)): _syntax(path, path.stat().st_mtime_ns) for path in code_files(root, kind)}
    )


@functools.cache  # dozens of named optimizers share these files
def _syntax(path: Path, mtime_ns: int) -> str:
    return syntax_sha256(path)


def environment() -> dict[str, str]:
    """Versions and hardware class that can change the numbers of a run: the same everywhere they are equal."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "machine": platform.machine(),
        "accelerator": training_accelerator(),
        **versions,
        **{name: _version_or_none(name) for name in KERNELS},
    }


def _version_or_none(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
