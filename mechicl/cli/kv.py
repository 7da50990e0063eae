"""`mechicl kv`: what the examples change in the query's keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from mechicl.cli.options import BatchSize, Prompts, Quiet, Source, check_folder, one_of, write_text
from mechicl.errors import EpisodeError

CONTROLS = ("filler", "zero-shot", "both")


def kv(
    control: Annotated[str, typer.Option(help="filler (as many neutral tokens), zero-shot (the question alone), or both with a test between them.")] = "both",
    filler: Annotated[str, typer.Option(help="turns: the same turns, emptied. words: neutral words only.")] = "turns",
    spans: Annotated[str | None, typer.Option(help='Only these of the query\'s tokens, e.g. "query image,last token".')] = None,
    factors: Annotated[bool, typer.Option("--factors", help="Also break the meaning of the examples and change their form, and say what each moves.")] = False,
    semantics: Annotated[str, typer.Option(help="How --factors breaks the meaning: other class, other label, noise, shuffled words.")] = "other class",
    format: Annotated[str, typer.Option(help="How --factors changes the form: label first, template, separators, option markers, swapped, one turn, pictures first.")] = "label first",  # noqa: A002
    margin: Annotated[bool, typer.Option("--margin", help="Also ask whether the query is nearer to examples of its own label, and whether that tells right answers.")] = False,
    similarity: Annotated[bool, typer.Option("--similarity", help="Also ask whether examples like the query shift more.")] = False,
    source: Source = Source(),
    given: Prompts = Prompts(episodes=32),
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for the tables and an HTML page.")] = None,
    batch_size: BatchSize = 8,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Compare keys and values of the query with and without the examples: how far they move, by what, and what that says about the answers."""
    named = _check(control, filler, spans, semantics, format)
    folder = check_folder(out)
    prompts = given.asked(by_label=margin)
    few = prompts.draw()
    loaded = source.load(quiet)
    from mechicl.analysis.shift.story import KVPlan, examples_story, kv_cost

    plan = KVPlan(control=control, filler=filler, spans=named, semantics=semantics, format=format, shares=factors, margin=margin, similarity=similarity,  # type: ignore[arg-type]
                  most_shift=given.episodes, most_shares=given.episodes, most_margin=given.episodes)  # fmt: skip
    typer.echo(f"keys and values: {kv_cost(loaded, few, plan, batch_size=batch_size)}", err=True)
    story = examples_story(loaded, few, plan, seed=given.seed, batch_size=batch_size, task=prompts.name, progress=not quiet)
    if all(part is None for part in (story.shift, story.shares, story.margin, story.similarity)):
        raise EpisodeError(" ".join(story.notes))
    from mechicl.views.kv_story import kv_notes, kv_told

    _list(story)
    for text in kv_told(story):
        typer.echo(text)
    for note in kv_notes(story):
        typer.echo(note, err=True)
    if folder is not None:
        command = f"mechicl kv --model {source.model} {prompts.flags} --control {control} --filler {filler}"
        command += f' --spans "{spans}"' if spans else ""
        command += f' --factors --semantics "{semantics}" --format "{format}"' if factors else ""
        command += "".join(f" --{name}" for name, on in (("margin", margin), ("similarity", similarity)) if on)
        _write(folder, story, f"{command} --out {folder.name}")


def _check(control: str, filler: str, spans: str | None, semantics: str, form: str) -> tuple[str, ...] | None:
    """Refuses options that do not exist before a model is loaded; the spans asked for.

    Raises:
        OptionError: one of them is not among those that there are.
    """
    one_of("control", control, CONTROLS)
    from mechicl.analysis.shift.kv_shift import check_spans
    from mechicl.prompts.filler import Filler
    from mechicl.prompts.reform import BREAKS, FORMS

    one_of("filler", filler, get_args(Filler))
    one_of("semantics", semantics, tuple(BREAKS))
    one_of("format", form, tuple(FORMS))
    return None if spans is None else check_spans([part.strip() for part in spans.split(",") if part.strip()])


def _list(story: Any) -> None:
    """Tables of what was found, a row each."""
    shift, shares, margin = story.shift, story.shares, story.margin
    if shift is not None:
        both = [shift, *shift.others.values()]
        typer.echo(
            f"n = {shift.n} episodes, {len(shift.skipped)} left out; relative L2 with the examples, averaged over layers and heads; 95 % intervals, * differs from filler, corrected p < 0.05"
        )
        typer.echo(
            f"{'part':<6} {'span':<16} "
            + " ".join(f"{'against ' + one.control:<26}" for one in both)
            + (" examples minus filler" if shift.test else "")
        )
        for part, span in shift.pooled:
            cells = [_interval(one.pooled[part, span]) for one in both]
            test = ""
            if shift.test is not None:
                star = " *" if shift.test.pooled_p[part, span] < 0.05 else ""
                test = f" {_interval(shift.test.pooled[part, span])}{star}"
            typer.echo(f"{part:<6} {span:<16} " + " ".join(f"{cell:<26}" for cell in cells) + test)
    if shares is not None:
        typer.echo(f"shares of what moves keys and values, n = {shares.n} episodes")
        for part in shares.parts:
            for source, e in shares.pooled[part].items():
                typer.echo(f"  {part} {source:<14} {_interval(e)}")
        for condition, e in shares.accuracy.items():
            typer.echo(f"  accuracy, {condition.replace('+', ' + '):<32} {_interval(e)}  margin {_interval(shares.margin[condition])} nats")
    if margin is not None:
        typer.echo(
            f"contrastive margin, n = {margin.n} episodes{' ' * bool(story.prompts)}{story.prompts}, {100 * margin.accuracy:.0f} % right; heads best first (attention is the baseline)"
        )
        for name, part in margin.parts.items():
            best = ", ".join(f"{a}.{b} {part.value[a, b]:.3f}" for a, b in part.top(3))
            typer.echo(f"  {name:<10} {best:<36} AUROC of the best, held out: {_interval(part.held_out)}")


def _interval(e: Any) -> str:
    """ "0.123 (0.100 to 0.150)"."""
    return "not known" if e.value != e.value else f"{e.value:.3f} ({e.low:.3f} to {e.high:.3f})"


def _write(folder: Path, story: Any, command: str) -> None:
    """A CSV for each part, and kv.html with the figures."""
    from mechicl.views.kv_sections import kv_blocks
    from mechicl.views.kv_story import DEFINITIONS, kv_notes, kv_told
    from mechicl.views.page import PageContent, write_page

    folder.mkdir(exist_ok=True)
    frames = {"shift": story.shift, "similarity": story.similarity, "shares": story.shares, "margin": story.margin}
    for name, part in frames.items():
        if part is not None:
            write_text(folder / f"{name}.csv", part.to_frame().to_csv(index=False, lineterminator="\n"))
    if story.shares is not None:
        write_text(folder / "answers.csv", story.shares.answers_frame().to_csv(index=False, lineterminator="\n"))
    made = next(part for part in frames.values() if part is not None).provenance
    title = f"What the examples change in keys and values of {made.model} on {made.task}"
    content = PageContent(title, tuple(kv_told(story)), tuple(kv_blocks(story)), made, command, tuple(kv_notes(story)), DEFINITIONS)
    typer.echo(f"Written to {write_page(folder / 'kv.html', content)}.", err=True)
