"""A refusal of a name says the nearest one first, and does not bury it in a list."""

from __future__ import annotations

from muonlab.registry.errors import unknown_name

MANY = [f"arm-{number:02}" for number in range(20)]


def test_the_nearest_comes_before_the_list() -> None:
    said = str(unknown_name("here", "arm", "nola", ["muon", "nolah"]))
    assert said == "here: unknown arm 'nola'. Did you mean 'nolah'? Allowed: muon, nolah."


def test_where_none_is_near_all_are_allowed() -> None:
    assert str(unknown_name("here", "arm", "x", ["muon"])) == "here: unknown arm 'x'; allowed: muon."


def test_a_long_list_is_cut_only_where_another_place_has_it_all() -> None:
    cut = str(unknown_name("here", "arm", "x", MANY, all_in="`muon study list`"))
    assert cut.endswith("arm-07 ... and 12 more (`muon study list`).")
    assert str(unknown_name("here", "arm", "x", MANY)).endswith("arm-18, arm-19.")
    assert str(unknown_name("here", "arm", "x", MANY[:8], all_in="`muon study list`")).endswith("arm-06, arm-07.")
