"""Stage `fingerprint`: check params.yaml and write the hashes of code and environment for every optimizer in it.

It is the first stage of every pipeline and always runs, so a wrong parameter is refused here, in one sentence,
before anything is written.
"""

from __future__ import annotations

import json

from muonlab.pipeline.fingerprint import code_fingerprint, environment
from muonlab.pipeline.layout import Layout
from muonlab.pipeline.resolve import check_study, load_params, load_study
from muonlab.registry.canonical import sha256_of
from stages._main import run_stage


def main() -> None:
    """Write data/fingerprint/<optimizer>.json."""
    layout = Layout.find()
    params = load_params(layout.params)
    check_study(params, load_study(layout, params.study))
    around = environment()
    for arm, options in params.optimizers.items():
        kind = str(options.get("kind", arm))
        content = {
            "kind": kind,
            "code": code_fingerprint(layout.root, kind),
            "environment": sha256_of(around),
            "environment_versions": around,
        }
        path = layout.fingerprint(arm)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_stage(main)
