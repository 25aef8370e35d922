"""Where a model, a tokenizer or a data set comes from: a folder of one's own, or the Hugging Face hub.

A folder in the hub's layout is taken as it is. From the hub only what is pinned is read, so that the same settings
mean the same bytes next year: a commit, never a branch or a tag. The hub's own clients repeat a request for half a
minute when there is no network; here one short probe decides, and without an answer they are told to look into their
cache (`HF_HOME`) alone, as `HF_HUB_OFFLINE=1` does.
"""

from __future__ import annotations

import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

from muonlab.registry.errors import UsageError

PROBE_S = 5.0
_COMMIT = re.compile("[0-9a-f]{40}")


def local_folder(name: str, root: Path) -> Path | None:
    """The folder that `name` stands for, relative to `root`; None where there is none, and the hub is meant.

    Raises UsageError for what can only be a path (`./x`, `../x`, `/x`, `~/x`) and is no folder.
    """
    path = root / Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")):
        raise UsageError(f"{name}: no such folder ({path}); name an existing one, or a repository of the hub.")
    return None


def pinned(where: str, name: str, revision: str | None) -> str:
    """Return the revision of a hub repository; raises UsageError where none is given, or one that can move.

    `where` is the setting that holds the revision.
    """
    if revision is None or not _COMMIT.fullmatch(revision):
        found = "null" if revision is None else f"{revision!r}, which is no commit and may move,"
        raise UsageError(
            f"{where}: found {found} for {name} of the hub; set it to a commit, the 40 hex digits that "
            f"{endpoint()}/{name} shows under `Files` > `History`."
        )
    return revision


def endpoint() -> str:
    """Address of the hub."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def go_offline_if_unreachable() -> bool:
    """Ask the hub for a sign of life; without one, make its clients look into their cache only. Return `offline`."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return True
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint(), method="HEAD"), timeout=PROBE_S):  # noqa: S310
            return False
    except urllib.error.HTTPError:
        return False  # an answer, if only to refuse: the client will say it better
    except (OSError, ValueError):
        pass
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Those that are imported have read the environment already.
    for module in ("huggingface_hub.constants", "datasets.config"):
        if module in sys.modules:
            sys.modules[module].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    return True


def missing(what: str, name: str, *, setting: str, offline: bool, reason: str) -> UsageError:
    """The refusal for what the hub did not give: what is missing, why, and how to supply it."""
    why = f"{endpoint()} does not answer and it is not in the cache" if offline else reason
    return UsageError(
        f"{setting}: {what} {name} cannot be read ({why}); connect to the network, or set HF_HOME to a cache that has "
        f"it (HF_HUB_OFFLINE=1 then asks nobody), or download it elsewhere and let `{setting}` name the folder."
    )
