"""Muon: the update of each hidden matrix is the orthogonal factor of its momentum.

    M <- mu*M + g;  p <- p - lr * adjust(m, n) * polar(M),  polar(U S V^T) = U V^T

Everything that is not a hidden matrix is updated by AdamW, at the same schedule.
Source: K. Jordan, https://kellerjordan.github.io/posts/muon/ (there polar is five Newton-Schulz steps).
"""

from optim.core.options import MuonOptions
from optim.core.registry import register

register("muon", MuonOptions)
