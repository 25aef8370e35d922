"""Stage `fingerprint`: check params.yaml and write the hashes of code and environment for every optimizer in it.

It always runs, before any training, so a wrong parameter is refused here, in one sentence, before anything is
written. It also makes the folders in which DVC runs the cells of open studies, since DVC does not.
"""

from __future__ import annotations

from muonlab.pipeline.doors import check_grid, make_folders, open_studies
from muonlab.pipeline.fingerprint import write_fingerprints
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import check_study, load_params, load_study
from stages._main import run_stage


def main() -> None:
    """Write data/fingerprint/<optimizer>.json."""
    layout = Layout.find()
    params = load_params(layout.params)
    check_study(params, load_study(layout, params.study))
    studies = [load_study(layout, slug) for slug in open_studies(layout)]
    for study in studies:
        check_grid(layout, study)
    write_fingerprints(layout, params)
    for study in studies:
        make_folders(layout, study)


if __name__ == "__main__":
    run_stage(main)
