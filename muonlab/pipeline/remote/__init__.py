"""Studies on a rented machine that is reached over SSH: which machines there are, runs on them, and what comes back."""
