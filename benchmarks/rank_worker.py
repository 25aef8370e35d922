"""One rank of two: steps of Muon on word of command, alone or with the orthogonalisation split.

    python -m benchmarks.rank_worker STORE RANK        words on stdin: split, alone, sum split, sum alone

Each word is answered by a line, the sums by a hash of the weights.
"""

import hashlib
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import distributed

import optim
from benchmarks.optim_step import SHAPES, Matrices

torch.set_num_threads(1)
store, rank = sys.argv[1], int(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
sides = {}
for word, split in (("split", True), ("alone", False)):
    model = Matrices([shape for shape, _ in SHAPES.values() for _ in range(2)])
    model.renew_gradients()
    sides[word] = model, optim.build("muon", model, orthogonalizer="auto", diagnose_every=0, shard=split)
for line in sys.stdin:
    command, _, word = line.strip().rpartition(" ")
    model, optimizer = sides[word]
    if command == "sum":
        weights = b"".join(weight.detach().numpy().tobytes() for weight in model.weights)
        print(hashlib.sha256(weights).hexdigest(), flush=True)
    else:
        optimizer.step()
        print("done", flush=True)
distributed.destroy_process_group()
