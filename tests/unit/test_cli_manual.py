"""The manual is made from the commands, and what it says of the JSON answers is what they hold."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from muonlab.cli import main
from muonlab.cli.manual import answers, page

MANUAL = Path(__file__).parents[2] / "docs" / "cli.md"


def commands(group: click.Group, before: str) -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        found[f"{before} {name}"] = command
        if isinstance(command, click.Group):
            found |= commands(command, f"{before} {name}")
    return found


EVERY = commands(main, "muon")


def test_the_manual_is_the_one_that_the_commands_make() -> None:
    assert page() == MANUAL.read_text(encoding="utf-8"), "make docs"


def test_every_command_stands_under_one_heading_and_in_the_manual() -> None:
    listed = [command.name for chapter in main.chapters().values() for command in chapter]
    assert sorted(map(str, listed)) == sorted(main.commands)
    headings = re.findall(r"^### (.+)$", MANUAL.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(headings) == sorted(EVERY)


@pytest.mark.parametrize("name", sorted(EVERY))
def test_every_command_and_option_says_what_it_does(name: str) -> None:
    command = EVERY[name]
    assert command.help
    assert command.help.strip()[0].isupper()
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.help:
            # A name that says all, beside a default or in the text of the command.
            assert parameter.show_default or parameter.opts[0].lstrip("-") in command.help, parameter.opts


@pytest.mark.parametrize("name", sorted(answers()))
def test_every_key_of_an_answer_is_in_the_manual_under_its_command(name: str) -> None:
    text = MANUAL.read_text(encoding="utf-8")
    section = text.partition(f"\n### {name}\n")[2].partition("\n##")[0]
    for answer in answers()[name]:
        for key in answer.model_fields:
            assert f"| `{key}` |" in section
    assert any("--json" in option.opts for option in EVERY[name].params)
