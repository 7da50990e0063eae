"""`mechicl eval tasks`: accuracy over shots on VL-ICL Bench, written and by likelihood."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from mechicl.cli.eval import parse_shots
from mechicl.cli.options import BatchSize, Quiet, Seed, Source, check_folder, one_of, write_text
from mechicl.errors import OptionError

Data = Annotated[str, typer.Option(help='The benchmark\'s folder, or "generated": small sets in its layout, made for this run.', rich_help_panel="Episodes")]  # fmt: skip
Tasks = Annotated[str, typer.Option("--task", "-t", help="open_mi, matching_mi, clevr, operator_induction, operator_induction_interleaved, textocr; several separated by commas; or all.", rich_help_panel="Episodes")]  # fmt: skip
Said = Annotated[str, typer.Option("--description", help="How much the instruction says: nothing, concise or detailed.", rich_help_panel="Episodes")]  # fmt: skip


def tasks(
    source: Source = Source(),
    data: Data = "generated",
    task: Tasks = "all",
    shots: Annotated[str, typer.Option(help="As the benchmark counts them, separated by commas; 0 is always run.", rich_help_panel="Episodes")] = "0,1,2,4",
    queries: Annotated[int | None, typer.Option("--queries", "-n", min=1, help="How many, drawn at random; by default all.", rich_help_panel="Episodes")] = None,
    description: Said = "concise",
    size: Annotated[int | None, typer.Option(min=8, help="Pictures are shrunk to it, pixels; by default 56 for generated ones, else left as they are.", rich_help_panel="Episodes")] = None,
    seed: Seed = 0,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; by default the longest candidate and 16 more (the release: 15).")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for answers, tables and an HTML page; the same command goes on where it was.")] = None,
    batch_size: BatchSize = 8,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """How many queries of VL-ICL Bench does the model answer, without examples and with more and more of them?"""
    one_of("description", description, ("nothing", "concise", "detailed"))
    counts, folder, names = parse_shots(shots), check_folder(out), task_names(task)
    with _loaded(data, names, queries, size, seed) as found:
        for one in found:
            if one.report.problems:
                typer.echo(str(one.report), err=True)
            one.episodes(
                queries and min(queries, len(one.queries)), shots=max(counts), seed=seed
            )  # what cannot be drawn is refused before a model is loaded
        loaded = source.load(quiet)
        from mechicl.analysis.written_answers import written_answers

        if folder is not None:
            folder.mkdir(exist_ok=True)
        results = [
            written_answers(
                loaded, one, shots=counts, n=queries and min(queries, len(one.queries)), description=description, max_new_tokens=max_new_tokens, seed=seed,  # type: ignore[arg-type]
                out=None if folder is None else folder / one.name, batch_size=batch_size, progress=not quiet,
            )
            for one in found
        ]  # fmt: skip
    for result in results:
        _list(result)
    if folder is not None:
        asked = f"mechicl eval tasks --model {source.model} --data {data} --task {task} --shots {shots}{f' --queries {queries}' if queries else ''} --description {description}{f' --size {size}' if size else ''} --seed {seed} --out {folder.name}"  # fmt: skip
        _write(folder, results, asked)


def task_names(text: str) -> list[str]:
    """ "open_mi,clevr" or "all" -> tasks.

    Raises:
        OptionError: one that there is not.
    """
    from mechicl.data.vl_icl import NAMES, task_of

    if text == "all":
        return [name for name in NAMES if name != "fast_open_mi"]
    return list(dict.fromkeys(task_of(part.strip()) for part in text.split(",") if part.strip()))


@contextmanager
def _loaded(data: str, names: list[str], queries: int | None, size: int | None, seed: int) -> Iterator[list[Any]]:
    """Checked tasks; generated ones lie in a folder that is gone afterwards."""
    from mechicl.data.vl_icl import load_vl_icl
    from mechicl.data.vl_icl_made import write_vl_icl

    if data != "generated":
        if not Path(data).expanduser().is_dir():
            raise OptionError(f"data must be a folder or 'generated'; there is no folder {data!r}. Check the path.")
        yield [load_vl_icl(data, name, size=size, strict=False) for name in names]  # type: ignore[arg-type]
        return
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            n = min(queries or 60, 60 if name.startswith("operator") else 10_000)
            write_vl_icl(place, name, n=n, size=size or 56, seed=seed)  # type: ignore[arg-type]
        yield [load_vl_icl(place, name) for name in names]  # type: ignore[arg-type]


def _list(result: Any) -> None:
    skipped = f", {len(result.skipped)} skipped" if result.skipped else ""
    typer.echo(f"{result.task}: n = {result.n} queries, the same at every number of shots{skipped}; always {result.commonest!r}: {result.always.value:.3f}; 95 % intervals")  # fmt: skip
    typer.echo(
        f"{'shots':<7}{'written':<24}{'our rule':<10}{'likelihood':<24}{'chance':>7}{'copied':>8}   against 0 shots (written; likelihood)"
    )
    for row in result.rows:
        tests = [
            next((c for c in result.changes if c.measure == name and c.shots == row.shots), None) for name in ("written", "likelihood")
        ]
        told = "; ".join(f"{c.change.value:+.3f}, p = {c.holm_p:.2g}" for c in tests if c is not None)
        typer.echo(f"{row.shots:<7}{_cell(row.written):<24}{row.ours.value:<10.3f}{_cell(row.likelihood):<24}{row.chance:>7.3f}{row.copied.value:>8.3f}   {told}")  # fmt: skip
    for note in result.notes:
        typer.echo(note, err=True)


def _cell(e: Any) -> str:
    return "-" if e.n == 0 else f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"


def _write(folder: Path, results: list[Any], command: str) -> None:
    """tasks.csv with every number, tasks.html with the figures."""
    import pandas as pd

    from mechicl.views.page import PageContent, block, write_page
    from mechicl.views.plots import plot
    from mechicl.views.written import about_written

    write_text(folder / "tasks.csv", pd.concat([result.to_frame() for result in results], ignore_index=True).to_csv(index=False, lineterminator="\n"))  # fmt: skip
    blocks = tuple(
        block(f"task-{k}", r.task, plot(r), about_written(r), r.to_frame(), raw=r.answers_frame()) for k, r in enumerate(results)
    )
    told = tuple(f"{r.task}: {_cell(r.rows[-1].written)} written at {r.rows[-1].shots} shots, {_cell(r.rows[0].written)} without examples (n = {r.n})." for r in results)  # fmt: skip
    notes = tuple(dict.fromkeys(f"{r.task}: {note}" for r in results for note in r.notes))
    content = PageContent(f"VL-ICL Bench: {results[0].provenance.model}", told, blocks, results[0].provenance, command, notes)
    typer.echo(f"Written to {write_page(folder / 'tasks.html', content)}.", err=True)
