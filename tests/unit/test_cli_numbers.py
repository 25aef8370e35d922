"""No option takes nan or infinity for a number: `--max-cost nan` would never stop a run."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from click.types import FloatParamType

from muonlab.cli import main
from muonlab.cli.options import Finite, FiniteRange
from muonlab.registry.errors import UsageError


def numbers(command: click.Command, name: str) -> Iterator[tuple[str, FloatParamType]]:
    for option in command.params:
        if isinstance(option.type, FloatParamType):
            yield f"{name} {option.opts[0]}", option.type
    for child in command.commands.values() if isinstance(command, click.Group) else ():
        yield from numbers(child, f"{name} {child.name}")


def test_every_number_of_every_command_is_finite() -> None:
    found = dict(numbers(main, "muon"))
    assert "muon study run --max-cost" in found
    assert [name for name, kind in found.items() if not isinstance(kind, Finite)] == []


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("kind", [Finite(), FiniteRange()])
def test_what_is_not_finite_is_refused(kind: Finite, text: str) -> None:
    option = click.Option(["--max-cost"])
    with pytest.raises(UsageError, match=rf"--max-cost: found {text}; give a finite number\."):
        kind.convert(text, option, None)


def test_a_finite_number_keeps_its_bounds() -> None:
    price = FiniteRange(0, min_open=True)
    assert price.convert("2.80", None, None) == 2.8
    with pytest.raises(click.BadParameter, match="not in the range x>0"):
        price.convert("0", None, None)
