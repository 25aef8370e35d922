"""What a report says of a study's gates: how they stand, and that it was started against one."""

from __future__ import annotations

from muonlab.reporting.standing import Standing
from muonlab.reporting.wording import moment


def gate_sentences(standing: Standing) -> list[str]:
    """Each gate as it stands now."""
    return [f"The study {gate.sentence}: {'open' if gate.is_open else 'closed'}." for gate in standing.snapshot.gates]


def gate_warnings(standing: Standing) -> list[str]:
    """Each override, and each other gate that is closed although the study has results."""
    snapshot = standing.snapshot
    overrides = snapshot.registration.overrides if snapshot.registration else []
    found = [
        f"Started against its gate, by --override on {moment(override.at)}: the study {sentence}."
        for override in overrides
        for sentence in override.gates
    ]
    known = tuple(sentence for override in overrides for sentence in override.gates)
    if any(record.is_result and record.study == snapshot.study.slug for record in snapshot.records):
        found += [
            f"Started against its gate, or the gate has closed since: the study {gate.sentence}."
            for gate in snapshot.gates
            if not gate.is_open and not any(sentence.startswith(f"{gate.asking};") for sentence in known)
        ]
    return found
