"""The group that every level of `muon` is: refusals in one sentence, and the nearest command for a wrong one."""

from __future__ import annotations

from typing import Any

import click

from muonlab.registry.errors import MuonlabError, nearest


class Group(click.Group):
    """Reports a refusal as one sentence and exits with its code; suggests the nearest command."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MuonlabError as error:
            click.echo(f"muon: {error}", err=True)
            ctx.exit(error.exit_code)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(error.message + nearest(args[0], self.list_commands(ctx)), ctx) from None
