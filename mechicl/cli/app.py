"""The program itself: what every command shares, and how a mistake ends (one line on stderr, exit code 2)."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mechicl.errors import MechiclError


class Commands(TyperGroup):
    """A group whose commands end with one line instead of a traceback when mechicl refuses something."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MechiclError as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from error
        except RuntimeError as error:
            if ctx.params.get("debug") or type(error).__name__ != "OutOfMemoryError":
                raise
            typer.echo("Error: the device's memory is full. Use a smaller --batch-size, fewer --shots, or --dtype bfloat16.", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
                  help="Find and prove the in-context-learning circuit of a vision-language model.")  # fmt: skip
training = typer.Typer(no_args_is_help=True, help="Train small models that learn from the examples in their prompt.")
app.add_typer(training, name="train")
evaluation = typer.Typer(no_args_is_help=True, help="Evaluate a model on a published protocol.")
app.add_typer(evaluation, name="eval")
sets = typer.Typer(no_args_is_help=True, help="Write small data sets in published layouts, and look data through.")
app.add_typer(sets, name="data")
study = typer.Typer(no_args_is_help=True, help="Run a whole study: one command, one folder, one page.")
app.add_typer(study, name="study")


def _version(wanted: bool | None) -> None:
    if wanted:
        from mechicl import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def start(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")] = None,
) -> None:
    """Find and prove the in-context-learning circuit of a vision-language model."""
