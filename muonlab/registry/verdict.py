"""The six answers a comparison can have; every package imports them from here."""

from enum import StrEnum


class Verdict(StrEnum):
    """What is decided about one challenger.

    GO adopts it; NO_GO and EQUIVALENT keep the baseline and archive the challenger; INCONCLUSIVE asks for
    more pairs; INVALID refuses the data; INCOMPLETE waits for missing cells.
    """

    GO = "GO"
    NO_GO = "NO_GO"
    EQUIVALENT = "EQUIVALENT"
    INCONCLUSIVE = "INCONCLUSIVE"
    INVALID = "INVALID"
    INCOMPLETE = "INCOMPLETE"
