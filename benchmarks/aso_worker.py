"""deepsig's ASO as a process: a JSON line with two lists of losses in, a JSON line with eps_min out.

Runs in deepsig's own environment and imports nothing else of ours. Scores are negative losses, since ASO takes
higher for better: eps_min near 0 says that the challenger dominates the baseline, 0.5 or more that it does not.
"""

import json
import sys

from deepsig import aso

for line in sys.stdin:
    losses = json.loads(line)
    eps_min = aso(
        [-loss for loss in losses["challenger"]],
        [-loss for loss in losses["baseline"]],
        seed=0,
        num_jobs=1,
        show_progress=False,
    )
    print(json.dumps({"eps_min": float(eps_min)}), flush=True)
