"""`mechicl data`: write small made-up sets in published layouts, and look a folder or table through before anything is computed with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mechicl.cli.options import one_of
from mechicl.errors import OptionError

KINDS = ("auto", "vl-icl", "isekai", "memes", "classes", "table")

Out = Annotated[Path, typer.Argument(help="A folder, new or empty.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")]


def vl_icl(
    out: Annotated[Path, typer.Argument(help="The benchmark's folder; each task gets one in it, which must be new or empty.")],
    task: Annotated[str, typer.Option("--task", "-t", help="open_mi, matching_mi, clevr, operator_induction, operator_induction_interleaved, textocr, or all.")] = "all",
    queries: Annotated[int, typer.Option("--queries", "-n", min=1, help="Rows of query.json (operator tasks: at most 60).")] = 24,
    support: Annotated[int | None, typer.Option(min=1, help="Rows of support.json; by default what suits the task.")] = None,
    size: Annotated[int, typer.Option(min=16, help="Side of the pictures, pixels.")] = 64,
    seed: Seed = 0,
) -> None:  # fmt: skip
    """Write VL-ICL Bench in small: the published layout, made of mechicl's own pictures."""
    from mechicl.data.vl_icl import NAMES, load_vl_icl, task_of
    from mechicl.data.vl_icl_made import write_vl_icl

    names = [name for name in NAMES if name != "fast_open_mi"] if task == "all" else [task_of(task)]
    for name in names:
        write_vl_icl(out, name, n=queries, n_support=None if name == "open_mi" else support, size=size, seed=seed)  # type: ignore[arg-type]
        typer.echo(str(load_vl_icl(out, name).report))  # type: ignore[arg-type]


def isekai(
    out: Out,
    groups: Annotated[int, typer.Option(min=2, help="Unreal concepts with their real partners.")] = 20,
    per_class: Annotated[int, typer.Option(min=2, help="Pictures of each.")] = 32,
    pairs: Annotated[int, typer.Option(min=2, help="Unreal concepts in the lists.")] = 10,
    context: Annotated[int, typer.Option(min=1, help="Pictures in positive_list and negative_list.")] = 16,
    queries: Annotated[int, typer.Option(min=1, help="Queries of either side of a pair.")] = 4,
    size: Annotated[int, typer.Option(min=8, help="Side of the pictures, pixels.")] = 112,
    seed: Seed = 0,
) -> None:
    """Write a made-up set in the format of ISEKAI."""
    from mechicl.data.isekai import load_isekai
    from mechicl.data.isekai_made import write_isekai

    write_isekai(out, seed=seed, n_groups=groups, per_class=per_class, size=size, pairs=pairs, context=context, queries=queries)
    typer.echo(str(load_isekai(out).report))


def memes(
    out: Out,
    train: Annotated[int, typer.Option(min=4, help="Lines of train.jsonl.")] = 240,
    dev: Annotated[int, typer.Option(min=4, help="Lines of dev.jsonl, and of test.jsonl.")] = 80,
    words: Annotated[str, typer.Option(help='plain: "red star". made-up: words without meaning.')] = "plain",
    size: Annotated[int, typer.Option(min=8, help="Side of the pictures, pixels.")] = 112,
    seed: Seed = 0,
) -> None:
    """Write a harmless set in the layout of Hateful Memes."""
    one_of("words", words, ("plain", "made-up"))
    from mechicl.data.memes import load_memes
    from mechicl.data.memes_made import write_memes

    write_memes(out, {"train": train, "dev": dev, "test": dev}, size=size, seed=seed, words=words)  # type: ignore[arg-type]
    typer.echo(str(load_memes(out).report))


def check(
    source: Annotated[Path, typer.Argument(help="A folder, or a table (.csv, .tsv, .jsonl, .json, .parquet).")],
    kind: Annotated[str, typer.Option("--as", help="auto, vl-icl, isekai, memes, classes (a folder for each class) or table.")] = "auto",
    images: Annotated[Path | None, typer.Option(help="For a table or ISEKAI lists: where file names start from.")] = None,
) -> None:
    """Look every line and every picture of a data set through and say what it holds. Exit code 1 if something cannot be used."""
    one_of("--as", kind, KINDS)
    place = source.expanduser()
    found = _reports(place, kind_of(place) if kind == "auto" else kind, images)
    for report in found:
        typer.echo(str(report))
    if any(report.problems for report in found):
        raise typer.Exit(1)


def kind_of(source: Path) -> str:
    """What a folder or file looks like.

    Raises:
        OptionError: there is nothing.
    """
    from mechicl.data.isekai import SUFFIXES
    from mechicl.data.memes_check import SPLITS

    if source.is_file():
        return "table"
    if not source.is_dir():
        raise OptionError(f"source must be a folder or a table's file; there is no {source}. Check the path.")
    if (source / "query.json").is_file() or any(source.glob("*/query.json")):
        return "vl-icl"
    if any(path.stem.startswith(SPLITS) for path in source.glob("*.jsonl")) and (source / "img").is_dir():
        return "memes"
    if any(path.suffix in SUFFIXES and path.stem.upper().startswith("ISEKAI") for path in source.iterdir()):
        return "isekai"
    return "classes"


def _reports(source: Path, kind: str, images: Path | None) -> list[Any]:
    if kind == "vl-icl":
        return _vl_icl_reports(source)
    if kind == "memes":
        from mechicl.data.memes_check import check_memes

        return [check_memes(source)]
    if kind == "isekai":
        from mechicl.data.isekai import check_isekai

        return [check_isekai(source, images=images)]
    from mechicl.data.own import check_own

    return [check_own(source, images=images)]


def _vl_icl_reports(source: Path) -> list[Any]:
    """Of every task in a benchmark's folder, or of the one task whose folder it is."""
    from mechicl.data.vl_icl import FOLDERS, NAMES, task_of
    from mechicl.data.vl_icl_check import check_vl_icl

    inside = [name for name in NAMES if (source / name / "query.json").is_file()]
    if not inside and source.resolve().name not in NAMES:
        raise OptionError(
            f"source must be a task's folder, or hold some; {source} is called by none of {', '.join(NAMES)}. Rename it as published."
        )
    tasks = dict.fromkeys(task_of(name) for name in inside or [source.resolve().name])
    return [check_vl_icl(source, name, names=FOLDERS.get(name, (name,))) for name in tasks]
