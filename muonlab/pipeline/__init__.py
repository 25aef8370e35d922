"""From a declaration to its evidence: cells resolved, trained once, collected, judged. Used by stages and `muon`."""
