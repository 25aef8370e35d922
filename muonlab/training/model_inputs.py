"""What a run reads of a model that others have made, as one text that differs where that does. Imports no torch.

    folder     SHA-256 of {file name: SHA-256 of its content} over config.json and, unless the weights are drawn anew,
               the safetensors files and their index
    package    its installed version
    hub        nothing: the commit, which stands in the settings, holds the same files for ever

A file is hashed once per process for as long as its size and time of change stay: a billion weights take seconds.
"""

from __future__ import annotations

import functools
from pathlib import Path

from muonlab.registry.canonical import sha256_of
from muonlab.registry.errors import UsageError
from muonlab.registry.files import file_sha256
from muonlab.registry.settings import PretrainedSettings
from muonlab.training import hub, packages

SETTING = "model.pretrained"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"


def model_input(settings: PretrainedSettings, root: Path) -> str:
    """What is read of the model, whose folder is relative to `root`; empty for a model of the hub.

    Raises UsageError where the folder, its configuration or the package is missing.
    """
    name = settings.pretrained
    if packages.is_package(name):
        return packages.installed(SETTING, name, settings.revision).version
    folder = hub.local_folder(name, root)
    if folder is None:
        return ""
    files = [config_file(folder)]
    if settings.start == "pretrained":
        files += sorted([*folder.glob("*.safetensors"), *folder.glob(INDEX_FILE)])
    return sha256_of({path.name: _file_sha256(path, (at := path.stat()).st_size, at.st_mtime_ns) for path in files})


def config_file(folder: Path) -> Path:
    """The configuration of the model in `folder`; raises UsageError where there is none."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UsageError(f"{SETTING}: {folder} holds no {CONFIG_FILE}; save the model with `save_pretrained`.")
    return path


@functools.cache
def _file_sha256(path: Path, size: int, mtime_ns: int) -> str:
    return file_sha256(path)
