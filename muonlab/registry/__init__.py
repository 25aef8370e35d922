"""What was declared and what was run: study, cell, record, ledger. Imports neither torch nor mlflow."""
