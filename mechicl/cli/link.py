"""`mechicl eval link`: which heads carry the link in a model, and whether fine-tuning built them or sharpened what its base had."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mechicl.cli.eval import HeldOut, read_data
from mechicl.cli.options import BatchSize, Device, Dtype, Model, Quiet, Seed, Size, Trust, check_folder, load_model, one_of, write_text
from mechicl.errors import OptionError

Tuned = Annotated[list[str] | None, typer.Option("--adapted", "-a", help="NAME=FOLDER or FOLDER of a model fine-tuned from --model; several times for several.", rich_help_panel="Model")]  # fmt: skip
Pictures = Annotated[
    str, typer.Option(help='"generated" (made-up names of one length), or a folder of pictures for each class.', rich_help_panel="Episodes")
]


def link(
    model: Model = "demo",
    adapted: Tuned = None,
    data: Pictures = "generated",
    episodes: Annotated[int, typer.Option("--episodes", "-n", min=8, help="Half find heads, half prove them.", rich_help_panel="Episodes")] = 96,
    shots: Annotated[int, typer.Option(min=1, help="Examples of each of the two classes.", rich_help_panel="Episodes")] = 2,
    prompt: Annotated[str, typer.Option(help="published, short or sentences.", rich_help_panel="Episodes")] = "short",
    held_out: HeldOut = None,
    size: Size = 28,
    metric: Annotated[str, typer.Option(help="label_logprob: whole labels. logit_diff: first tokens, quicker.")] = "label_logprob",
    n_random: Annotated[int, typer.Option(min=19, help="Random sets of as many heads.")] = 20,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for tables and an HTML page; with --adapted the same command goes on where it was.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    batch_size: BatchSize = 16,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Which heads carry the link between a thing and its new name? With --adapted: did the fine-tuning build them?"""
    one_of("prompt", prompt, ("published", "short", "sentences"))
    one_of("metric", metric, ("label_logprob", "logit_diff"))
    folder, models = check_folder(out), parse_models(adapted or [])
    asked = _episodes(data, episodes, shots, prompt, held_out, size, seed)
    from mechicl.analysis.link.mechanism_compare import check_given

    for path in models.values():
        check_given(path)
    loaded = load_model(model, device, dtype, None, trust_remote_code, quiet)
    common: dict[str, Any] = {"metric": metric, "n_random": n_random, "seed": seed, "batch_size": batch_size, "progress": not quiet,
                              "task": f"{data if data == 'generated' else Path(data).name}, {shots} shots"}  # fmt: skip
    if folder is not None:
        folder.mkdir(exist_ok=True)
    result, frames = _run(loaded, models, asked, folder, common)
    if folder is not None:
        line = f"mechicl eval link --model {model}" + "".join(f" --adapted {name}={path.name}" for name, path in models.items())
        _write(folder, result, frames, f"{line} --episodes {episodes} --shots {shots} --seed {seed} --out {folder.name}")


def parse_models(given: list[str]) -> dict[str, Path]:
    """ "a=runs/a" or "runs/a" -> name and folder.

    Raises:
        OptionError: no such folder, or one name twice.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, rest = text.partition("=")
        path = Path(rest if equals else text).expanduser()
        name = name if equals else path.name
        if not path.is_dir():
            raise OptionError(f"adapted must be NAME=FOLDER of a fine-tuned model; there is no folder {path}. Check the path.")
        if not name or name in found:
            raise OptionError(f"adapted must have different names; got {name!r} twice or none. Write NAME=FOLDER.")
        found[name] = path
    return found


def _episodes(data: str, n: int, shots: int, prompt: str, held_out: Path | None, size: int, seed: int) -> list[Any]:
    from mechicl.data import link_context

    words = {"published": link_context.PUBLISHED, "short": link_context.SHORT, "sentences": link_context.SENTENCES}[prompt]
    if data == "generated":
        pool: Any = link_context.generated_pool(seed + 1, 10, max(8, shots + 2), size, split="held_out", names="made-up")
    else:
        pool, _ = read_data(data, "class-folders", shots, held_out, size, seed)
    return link_context.link_episodes(pool, n, shots=shots, prompt=words, seed=seed)


def _run(loaded: Any, models: dict[str, Path], asked: list[Any], folder: Path | None, common: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The result, and its tables by name; what is found is listed."""
    if models:
        from mechicl.analysis.link.mechanism_compare import build_or_sharpen

        found = build_or_sharpen(loaded, models, asked, out=None if folder is None else folder / "kept", **common)
        typer.echo(f"base: accuracy {found.base_accuracy}, chance {found.chance:.2f}")
        for row in found.rows:
            typer.echo(f"{row.name}: accuracy {row.accuracy}. {row.verdict}")
        return found, {"models": found.to_frame(), "heads": found.heads_frame(), "grafts": found.grafts_frame()}
    from mechicl.analysis.link.mechanism import link_circuit

    one = link_circuit(loaded, asked, **common)
    typer.echo(
        f"accuracy {one.accuracy.accuracy}, chance {one.accuracy.chance:.2f}; heads found on n = {one.n_find}, sets proved on {one.n_prove}"
    )
    for some in one.sets:
        typer.echo(f"{some.kind}: {' '.join(f'{a}.{b}' for a, b in some.heads) or 'none'}. {some.verdict}")
        for twin in one.carried:
            if (moved := one.moved.get((some.kind, twin))) is not None:
                typer.echo(f"  {twin} exchanged: carries {moved.share}; random sets {moved.random.mean():.2f}, p = {moved.p_random:.2f}")
    return one, {"heads": one.to_frame(), "sets": one.sets_frame()}


def _write(folder: Path, result: Any, frames: dict[str, Any], command: str) -> None:
    """A CSV for each table, and link.html with the figure."""
    from mechicl.results import BuildOrSharpen
    from mechicl.views.link_circuit import about_build, about_circuit
    from mechicl.views.page import PageContent, block, write_page
    from mechicl.views.plots import plot

    for name, frame in frames.items():
        write_text(folder / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n"))
    many = isinstance(result, BuildOrSharpen)
    first, raw = (frames["models"], frames["grafts"]) if many else (frames["heads"], frames["sets"])
    about = about_build(result) if many else about_circuit(result)
    told = (
        tuple(f"{row.name}: {row.verdict}" for row in result.rows) if many else tuple(f"{one.kind}: {one.verdict}" for one in result.sets)
    )
    title = "Was the link built, or sharpened?" if many else f"The heads that carry the link in {result.provenance.model}"
    blocks = (block("link-heads", "", plot(result), about, first, raw=raw),)
    typer.echo(
        f"Written to {write_page(folder / 'link.html', PageContent(title, told, blocks, result.provenance, command, result.notes))}.",
        err=True,
    )
