"""Run a stage: a refusal is one sentence on stderr and an exit code, never a traceback; it dies with its dvc."""

from __future__ import annotations

import sys
from collections.abc import Callable

from muonlab.pipeline.processes import die_with_ancestors
from muonlab.registry.errors import MuonlabError, UsageError
from muonlab.registry.files import full_disk_told


def run_stage(main: Callable[..., None], *names: str) -> None:
    """Call `main` with the command line's arguments, which must be as many as `names`, and exit.

    Exit code 0, or that of the MuonlabError that was raised (see muonlab.registry.errors).
    """
    arguments = sys.argv[1:]
    die_with_ancestors()
    try:
        if len(arguments) != len(names):
            raise UsageError(
                f"{main.__module__}: found {len(arguments)} arguments; expected {' '.join(names) or 'none'}."
            )
        with full_disk_told():
            main(*arguments)
    except MuonlabError as error:
        print(f"muonlab: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("muonlab: interrupted; the next start goes on from here.", file=sys.stderr)
        sys.exit(130)
