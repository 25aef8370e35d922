"""`python -m muonlab.cli` is `muon`."""

from muonlab.cli import main

main()
