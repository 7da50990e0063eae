"""The program itself: what every command shares, and how a mistake ends (one line on stderr, exit code 2) or Ctrl-C (130)."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from mechicl.errors import MechiclError, OptionError


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
        except KeyboardInterrupt:
            typer.echo(
                "Stopped. What was finished is in the --out folder, if the command keeps one: the same command goes on from there, a training with --resume.",
                err=True,
            )
            raise typer.Exit(130) from None
        except RuntimeError as error:
            if ctx.params.get("debug") or type(error).__name__ != "OutOfMemoryError":
                raise
            typer.echo("Error: the device's memory is full. Use a smaller --batch-size, fewer --shots, or --dtype bfloat16.", err=True)
            raise typer.Exit(2) from error


app: typer.Typer = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
                  help="Find and prove the in-context-learning circuit of a vision-language model.")  # fmt: skip
training: typer.Typer = typer.Typer(no_args_is_help=True, help="Train small models that learn from the examples in their prompt.")
app.add_typer(training, name="train")
evaluation: typer.Typer = typer.Typer(no_args_is_help=True, help="Evaluate a model on a published protocol.")
app.add_typer(evaluation, name="eval")
sets: typer.Typer = typer.Typer(no_args_is_help=True, help="Write small data sets in published layouts, and look data through.")
app.add_typer(sets, name="data")
study: typer.Typer = typer.Typer(no_args_is_help=True, help="Run a whole study: one command, one folder, one page.")
app.add_typer(study, name="study")


def command(group: typer.Typer, function: Callable[..., None], name: str | None = None) -> None:
    """Add a command to a group. Every command takes --debug, and one that has --model also takes the model as its only argument.

    A parameter that is a dataclass (`options.Source`, `options.Prompts`) stands for its fields, an option each; its default is theirs.

    Args:
        group: `app`, or one of its groups.
        function: The command as typer takes it.
        name: Of the command; by default the function's.
    """
    signature = inspect.signature(function, eval_str=True)
    groups: dict[str, Any] = {
        name: part.annotation for name, part in signature.parameters.items() if dataclasses.is_dataclass(part.annotation)
    }
    options = [option for part in signature.parameters.values() for option in _options(part)]
    by_name = any(option.name == "model" for option in options)

    @functools.wraps(function)
    def run(**given: Any) -> None:
        state, arguments = given.pop("state_of_parsing"), given.pop("argument", None)
        if given.pop("debug_here"):  # behind the command it counts as before it
            state.find_root().params["debug"] = True
        if arguments:
            given["model"] = _one_model(state, arguments, given["model"])
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        function(**given)

    def keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)

    own = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options]
    shared = [keyword("debug_here", DebugHere, False), *([keyword("argument", Argument, None)] if by_name else [])]
    state = keyword("state_of_parsing", typer.Context, inspect.Parameter.empty)
    run.__signature__ = signature.replace(parameters=[state, *own, *shared])  # type: ignore[attr-defined]
    group.command(name)(run)


def _options(part: inspect.Parameter) -> list[inspect.Parameter]:
    """A parameter's options: those of a group's fields, or its own."""
    if not dataclasses.is_dataclass(part.annotation):
        return [part]
    hints = get_type_hints(part.annotation, include_extras=True)
    return [
        part.replace(name=field.name, annotation=hints[field.name], default=getattr(part.default, field.name))
        for field in dataclasses.fields(part.annotation)
    ]


def _check_argument(given: list[str] | None) -> list[str] | None:
    """One model at most, and nothing that looks like a file to write; asked before typer complains of an option that is missing.

    Raises:
        OptionError: naming what is too much.
    """
    for k, text in enumerate(given or []):
        if k or text.lower().endswith((".html", ".csv", ".png", ".json")):
            raise OptionError(
                f"arguments must be one model at most; got {text!r}{' beside ' + repr(given[0]) if given and k else ''}. "
                f"To write a file or folder of that name: --out {text}."
            )
    return given


def _one_model(context: Any, arguments: list[str], option: str | None) -> str:
    """The model given as an argument.

    Raises:
        OptionError: --model names another.
    """
    source = context.get_parameter_source("model")
    if source is not None and source.name == "COMMANDLINE" and option != arguments[0]:
        raise OptionError(f"model must be given once; got {arguments[0]!r} and --model {option}. Leave one away.")
    return arguments[0]


Argument = Annotated[list[str] | None, typer.Argument(metavar="MODEL", show_default=False, callback=_check_argument, help="The same as --model.")]  # fmt: skip
DebugHere = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


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
