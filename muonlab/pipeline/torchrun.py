"""`python -m muonlab.pipeline.torchrun PARENT RANKS MODULE ARGUMENTS`: torchrun, which does not outlive its parent.

Becomes torchrun, so that its process number is this one's: each rank is given it, `python -m MODULE NUMBER ARGUMENTS`,
to die with (`die_with_parent`). A killed torchrun would otherwise leave its ranks to finish the training alone.
"""

from __future__ import annotations

import os
import sys

from muonlab.pipeline.processes import die_with_parent

if __name__ == "__main__":
    parent, ranks, module, *arguments = sys.argv[1:]
    die_with_parent(int(parent))  # holds for what this process becomes, too
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={int(ranks)}"]
    os.execv(sys.executable, [*launcher, "-m", module, str(os.getpid()), *arguments])  # noqa: S606 - no shell is wanted
