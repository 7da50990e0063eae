"""The command line. Every command imports what it needs when it runs, so that `mechicl --help` is quick."""

import typer

app = typer.Typer(no_args_is_help=True, help="Mechanistic interpretability of in-context learning.")
