"""The command line. One file per command in `commands/`; none of them imports torch before it needs it, so that
`longtake --help` answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

from . import __version__
from .commands.analyze import analyze
from .commands.batch import batch
from .commands.bench import bench
from .commands.compare import compare
from .commands.convert import convert
from .commands.demo import demo
from .commands.generate import generate
from .commands.listing import models, policies
from .commands.plan import plan
from .commands.serve import serve
from .commands.shell import guarded
from .commands.train import train
from .commands.usage import Commands

app = typer.Typer(
    name="longtake", cls=Commands, add_completion=False, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longtake {__version__}")
        raise typer.Exit


@app.callback()
def longtake(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Autoregressive video of any length in bounded memory."""


for command in (generate, demo, compare, convert, plan, serve, batch, models, policies):
    app.command()(guarded(command))

app.add_typer(bench, name="bench")
app.add_typer(analyze, name="analyze")
app.add_typer(train, name="train")


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 the model failed, 2 wrong input or full disk, 130 stopped by Ctrl-C, 143 by
    SIGTERM, 129 by SIGHUP."""
    app()
