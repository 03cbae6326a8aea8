"""The outermost layer of the command line: usage errors as one line, and help for a command without arguments."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from . import shell

# What click raises for a wrong command line. typer imports click or brings its own, depending on its version; this base
# of a name that it always has is the same class in both.
_UsageError: Any = typer.BadParameter.__base__


class Commands(TyperGroup):
    """A group of commands whose usage errors look like every other error: one line on stderr, exit code 2."""

    def main(
        self, args: Sequence[str] | None = None, prog_name: str | None = None, complete_var: str | None = None,
        standalone_mode: bool = True, windows_expand_args: bool = True, **extra: Any,
    ) -> Any:  # fmt: skip
        """Run the command line `args`, by default the process's own, and exit."""
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except _UsageError as error:
            if not standalone_mode:
                raise
            message = error.format_message().strip().rstrip(".")
            command = error.ctx.command_path if error.ctx else "longtake"
            shell.say_error(f"{message[:1].lower()}{message[1:]}; see {command} --help")
            code = shell.WRONG_INPUT
        if standalone_mode:
            sys.exit(code or 0)
        return code

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As ever, but without any argument the answer is the help, and exit code 2."""
        if not args and not ctx.resilient_parsing:
            if text := ctx.get_help():  # with rich it is printed by now, and this is empty
                typer.echo(text)
            ctx.exit(shell.WRONG_INPUT)
        return super().parse_args(ctx, args)
