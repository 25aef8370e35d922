"""The command `muon`: run and read studies, and judge results. Everything heavy is imported inside the commands."""

from __future__ import annotations

import click

from muonlab.cli.accept import accept
from muonlab.cli.archive import archive
from muonlab.cli.calibrate import calibrate
from muonlab.cli.compare import compare
from muonlab.cli.doctor import doctor, setup
from muonlab.cli.group import Chapters
from muonlab.cli.next import next_
from muonlab.cli.power import power
from muonlab.cli.remote import remote
from muonlab.cli.report import report
from muonlab.cli.runs import commit, download, logs, status
from muonlab.cli.study import study
from muonlab.cli.tracking import tracking
from muonlab.cli.ui import ui
from muonlab.cli.verbs import baseline, nolah, pretrain
from muonlab.cli.verify import verify


@click.group(cls=Chapters, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="muonlab")
def main() -> None:
    """Is the new optimizer worth keeping? Declared, paired, multi-seed studies with a verdict.

    \b
    Exit codes: 0 done; 1 asked for (--fail-on-no-go, doctor, calibrate);
    2 usage or refused input, nothing written; 3 cells failed or the study is
    incomplete; 4 over budget; 5 the evidence contradicts itself.
    """


main.add_chapters(
    {
        "Studies": (study, next_, report, archive, accept, ui, tracking),
        "Results and plans without a study": (compare, power, calibrate),
        "One run": (baseline, nolah, pretrain, verify),
        "This machine": (status, logs, commit, download, doctor, setup),
        "Rented machines": (remote,),
    }
)
