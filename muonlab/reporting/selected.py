"""What a report says of a challenger that another study's results have picked: how many it was the best of, and where.

The pick's mean in the selecting study holds the luck that made it the best; only runs on other seeds are about the
method. Whether the challenger is that pick is read from the selecting study's results, not from the declaration.
"""

from __future__ import annotations

from muonlab.registry.snapshot import Snapshot


def selection_doubts(snapshot: Snapshot) -> list[str]:
    """That the declared challengers are not what the selecting study's results pick, in a sentence; else nothing."""
    its, challengers = snapshot.selection, snapshot.study.challengers
    if its is None or its.picked is None or challengers == [its.picked]:
        return []
    return [
        f"Not as selected: {' and '.join(challengers)} is declared as selected by the study {its.study}, whose results "
        f"pick {its.picked} out of {its.out_of} arms ({_mean(snapshot)})."
    ]


def selection_notes(snapshot: Snapshot) -> list[str]:
    """By what the challengers were selected and on what they are confirmed; nothing where nothing was selected."""
    its, study = snapshot.selection, snapshot.study
    if its is None:
        return []
    if doubts := selection_doubts(snapshot):
        return doubts
    where = "on new seeds only" if its.same_workload else f"on another workload, {study.workload}, only"
    challengers = " and ".join(study.challengers)
    if its.picked is None:
        return [
            f"Declared as selected from {its.study}, which could not be checked without its whole report: "
            f"{challengers}; run here {where}, so that none of the runs of {its.study} counts."
        ]
    return [
        f"Selected: {challengers}, out of {its.out_of} arms by the study {its.study} ({_mean(snapshot)}); confirmed "
        f"here {where}, so that none of the runs that picked it counts."
    ]


def _mean(snapshot: Snapshot) -> str:
    its = snapshot.selection
    assert its is not None
    assert its.picked is not None
    return f"the lowest mean final loss there, {its.means[its.picked]:.4f} nats/token"
