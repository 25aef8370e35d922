"""Processes that never outlive who started them: the system sends them a signal when the parent dies (Linux)."""

from __future__ import annotations

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_LIBRARY = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None  # loaded before any fork


def end_with_parent(how: signal.Signals) -> None:
    """Arrange that this process gets the signal `how` when its parent dies, even by SIGKILL."""
    if _LIBRARY is not None:
        _LIBRARY.prctl(PR_SET_PDEATHSIG, how)
