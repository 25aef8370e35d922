"""The group that every level of `muon` is: refusals in one sentence, and the nearest command for a wrong one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from muonlab.cli.terminal import note
from muonlab.registry.errors import MuonlabError, nearest
from muonlab.registry.files import full_disk_told

WHOLE = 500
"""Characters; more than any first sentence has."""


class Group(click.Group):
    """Reports a refusal as one sentence and exits with its code; suggests the nearest command."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with full_disk_told():
                return super().invoke(ctx)
        except MuonlabError as error:
            note(f"muon: {error}")
            ctx.exit(error.exit_code)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(error.message + nearest(args[0], self.list_commands(ctx)), ctx) from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they were added, which is the order of use."""
        return list(self.commands)

    def chapters(self) -> Mapping[str, Sequence[click.Command]]:
        """The commands under the headings of the help."""
        return {"Commands": list(self.commands.values())}

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with the whole of their first sentence, where click would cut it off."""
        width = max(len(name) for name in self.commands)
        for title, commands in self.chapters().items():
            with formatter.section(title):
                formatter.write_dl(
                    [(f"{command.name:<{width}}", command.get_short_help_str(limit=WHOLE)) for command in commands]
                )


class Chapters(Group):
    """A group whose commands stand under several headings."""

    def add_chapters(self, chapters: Mapping[str, Sequence[click.Command]]) -> None:
        """Add the commands of all chapters."""
        self._chapters = chapters
        for commands in chapters.values():
            for command in commands:
                self.add_command(command)

    def chapters(self) -> Mapping[str, Sequence[click.Command]]:
        return self._chapters
