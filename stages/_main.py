"""Run a stage: a refusal is one sentence on stderr and an exit code, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from muonlab.registry.errors import MuonlabError, UsageError


def run_stage(main: Callable[..., None], *names: str) -> None:
    """Call `main` with the command line's arguments, which must be as many as `names`, and exit.

    Exit code 0, or that of the MuonlabError that was raised (see muonlab.registry.errors).
    """
    arguments = sys.argv[1:]
    try:
        if len(arguments) != len(names):
            raise UsageError(
                f"{main.__module__}: found {len(arguments)} arguments; expected {' '.join(names) or 'none'}."
            )
        main(*arguments)
    except MuonlabError as error:
        print(f"muonlab: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("muonlab: interrupted; the next start goes on from here.", file=sys.stderr)
        sys.exit(130)
