"""Stage `prepare_data`: make the token file of one workload in data/<workload>."""

from __future__ import annotations

from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import find_workload, load_params
from stages._main import run_stage


def main(workload: str) -> None:
    """Write tokens.bin, tokenizer.json and meta.json."""
    layout = Layout.find()
    params = load_params(layout.params)
    settings = find_workload(params, workload).settings

    from muonlab.training.data import prepare  # imports tokenizers: late, so that refusals are quick

    # The user's own files are in the repository, not in a copy that DVC makes of what is committed.
    prepare(settings.data, layout.data(workload), progress=lambda text: print(text, flush=True), root=layout.main)


if __name__ == "__main__":
    run_stage(main, "WORKLOAD")
