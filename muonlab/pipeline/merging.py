"""The merge driver of git for what muonlab writes: `python -m muonlab.pipeline.merging BASE OURS THEIRS PATH`.

    dvc.lock            the stages of both sides, so that DVC knows the outputs of both; of a stage in both, ours
    registration.json   of one declaration the earlier registration, with both sides' starts against a closed gate;
                        of two declarations a merge as of any text, with its conflicts
    all others          ours: they are made of ledger and runs, and the next `muon study run` makes them of all runs

Git runs a driver only where the clone's own configuration has it: `set_up` writes it. The ledger needs none, its lines
are merged by git's own `union`. Source: gitattributes(5), "Defining a custom merge driver".
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

NAME = "merge.muonlab.name"
DRIVER = "merge.muonlab.driver"


def set_up(root: Path) -> None:
    """Tell the git of the clone `root` how to merge what muonlab writes. Raises CalledProcessError outside git."""
    for key, value in ((NAME, "what muonlab writes"), (DRIVER, _driver())):
        subprocess.run(["git", "config", key, value], cwd=root, check=True)


def is_set_up(root: Path) -> bool:
    """Whether the clone's git knows this driver, run by this Python."""
    asked = subprocess.run(["git", "config", DRIVER], cwd=root, capture_output=True, text=True, check=False)
    return asked.stdout.strip() == _driver()


def _driver() -> str:
    return f"{shlex.quote(sys.executable)} -m muonlab.pipeline.merging %O %A %B %P"


def merge(base: Path, ours: Path, theirs: Path, path: str) -> int:
    """Merge one file into `ours`, as git asks its drivers to; return 0, or another number where a conflict is left."""
    name = path.rpartition("/")[2]
    if name == "dvc.lock":
        return _merge_locks(base, ours, theirs)
    if name == "registration.json":
        return _merge_registrations(base, ours, theirs)
    if name == "verdict.json":
        folder = path.rpartition("/")[0]
        slug = folder.rpartition("/")[2]
        print(f"{folder}: ours is kept; `muon study run {slug}` makes it of the runs of both sides", file=sys.stderr)
    return 0


def _merge_locks(base: Path, ours: Path, theirs: Path) -> int:
    import yaml

    try:
        locks = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (theirs, ours)]
        merged = {**locks[0], **locks[1], "stages": {**locks[0]["stages"], **locks[1]["stages"]}}
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
        return _merge_text(base, ours, theirs)
    ours.write_text(yaml.safe_dump(merged, sort_keys=False), encoding="utf-8")
    return 0


def _merge_registrations(base: Path, ours: Path, theirs: Path) -> int:
    try:
        both = [json.loads(path.read_text(encoding="utf-8")) for path in (ours, theirs)]
        first, other = sorted(both, key=lambda its: (its["registered_at"], its["commit"] or ""))
        starts = {json.dumps(start): start for its in (first, other) for start in its["overrides"]}
    except (ValueError, TypeError, KeyError):
        return _merge_text(base, ours, theirs)
    merged = {**first, "overrides": [starts[key] for key in sorted(starts)]}
    # All else is what was declared: of two declarations none is chosen here.
    if merged != {**other, **{key: merged[key] for key in ("registered_at", "commit", "overrides")}}:
        return _merge_text(base, ours, theirs)
    ours.write_text(json.dumps(merged, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _merge_text(base: Path, ours: Path, theirs: Path) -> int:
    return subprocess.run(["git", "merge-file", str(ours), str(base), str(theirs)], check=False).returncode


if __name__ == "__main__":
    if sys.argv[1:]:
        base, ours, theirs = map(Path, sys.argv[1:4])
        sys.exit(merge(base, ours, theirs, sys.argv[4]))
    set_up(Path.cwd())
