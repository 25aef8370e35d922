"""`python -m muonlab.pipeline.dvc_child PARENT ARGUMENTS`: dvc, which does not outlive the process that starts it.

Killed with its driver, dvc holds no lock against the next start; its stages end with it (`die_with_ancestors`).
"""

from __future__ import annotations

import sys

from muonlab.pipeline.processes import die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv.pop(1)))
    from dvc.cli import main

    sys.exit(main(sys.argv[1:]))
