"""One thin script a DVC stage: parse, call muonlab, write. Run as `python -m stages.<name>`."""
