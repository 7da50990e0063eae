"""`mechicl patch` and `mechicl circuit`: which activations carry the answer, and which edges."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from mechicl.cli.options import BatchSize, Prompts, Quiet, Source, check_folder, one_of, write_text
from mechicl.errors import OptionError

PairsOption = Annotated[str, typer.Option("--pairs", help="How the corrupt prompts are made: swap_labels, swap_exemplars, swap_query, permute_labels, ...", rich_help_panel="Episodes")]  # fmt: skip
Metric = Annotated[str, typer.Option(help="logit_diff, label_logprob, logprob, prob or kl.")]
ENOUGH = 10
"""Pairs below which the command says that they are few."""

Out = Annotated[Path | None, typer.Option("--out", "-o", help="A folder for the tables and an HTML page.")]


def patch(
    pairs: PairsOption = "swap_labels",
    sites: Annotated[str, typer.Option(help="Separated by commas: resid_pre, resid_post, attn_out, mlp_out, z, q, k, v, pattern, embed, image_features, vision, ...")] = "resid_pre,z",
    by: Annotated[str | None, typer.Option(help="span, shot, pos or head; by default head for z, q, k, v and pattern, span for the rest.")] = None,
    metric: Metric = "logit_diff",
    direction: Annotated[str, typer.Option(help="denoise: clean activations into the corrupt run. noise: the other way round.")] = "denoise",
    layers: Annotated[str | None, typer.Option(help="Only these, e.g. 0-3,7.")] = None,
    spans: Annotated[str | None, typer.Option(help='Only these, e.g. "right label,last token".')] = None,
    align: Annotated[str | None, typer.Option(help="mean or resize, where the two prompts' spans differ in length; refused without.")] = None,
    source: Source = Source(),
    given: Prompts = Prompts(episodes=32),
    top: Annotated[int, typer.Option(min=1, help="Cells to list per site.")] = 8,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for cells, table and HTML page; the same command goes on where it was.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    batch_size: BatchSize = 16,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Put activations of one prompt into its twin and see how much of the answer goes with them."""
    wanted = _sites(sites)
    if by is not None:
        one_of("by", by, ("span", "shot", "pos", "head"))
    one_of("direction", direction, ("denoise", "noise"))
    if align is not None:
        one_of("align", align, ("mean", "resize"))
    _check_common(pairs, metric)
    kept, named = parse_layers(layers), tuple(part.strip() for part in spans.split(",") if part.strip()) if spans else None
    folder = check_folder(out)
    prompts = given.asked()
    few = prompts.draw(one_length=True)
    loaded = source.load(quiet)
    from mechicl.analysis.patching.patch import cost
    from mechicl.analysis.patching.patch import patch as exchange
    from mechicl.prompts.corrupt import minimal_pairs

    found = minimal_pairs(loaded, few, pairs, seed=given.seed)  # type: ignore[arg-type]
    groups = _groups(wanted, by)
    common: dict[str, Any] = {"metric": metric, "direction": direction, "layers": kept, "align": align, "batch_size": batch_size}
    only = [named if way in ("span", "shot") else None for way, _ in groups]
    for (way, some), spans_of in zip(groups, only, strict=True):
        typer.echo(f"{', '.join(some)} by {way}: {cost(loaded, found, sites=some, by=way, spans=spans_of, **common)}", err=True)  # type: ignore[arg-type]
    if dry_run:
        return
    with contextlib.redirect_stdout(sys.stderr):  # what is said about cost is no result
        results = [
            exchange(loaded, found, sites=some, by=way, spans=spans_of, out=_part(folder, way, len(groups)), seed=given.seed, task=prompts.name, progress=not quiet, **common)  # type: ignore[arg-type]
            for (way, some), spans_of in zip(groups, only, strict=True)
        ]  # fmt: skip
    typer.echo(
        f"n = {results[0].n} pairs ({pairs}), {len(results[0].skipped)} prompts without a partner; 0 corrupt run, 1 clean run; 95 % intervals, * corrected p < 0.05"
    )
    for result in results:
        _list_cells(result, top)
    _few(results[0].n)
    for note in dict.fromkeys(note for result in results for note in result.notes):
        typer.echo(note, err=True)
    if folder is not None:
        command = f"mechicl patch --model {source.model} {prompts.flags} --pairs {pairs} --sites {sites}"
        command += "".join(
            f" --{key} {value}"
            for key, value in (("by", by), ("layers", layers), ("spans", spans and f'"{spans}"'), ("align", align))
            if value
        )
        _write_effects(folder, results, f"{command} --metric {metric} --direction {direction} --out {folder.name}")


def circuit(
    pairs: PairsOption = "swap_exemplars",
    method: Annotated[
        str, typer.Option(help="What edges are scored by: EAP-IG, EAP, or exact (each edge dropped alone; slow).")
    ] = "EAP-IG",
    search: Annotated[
        str, typer.Option(help="threshold: the strongest edges; greedy: grown from the logits; prune: from the whole graph (slow).")
    ] = "threshold",
    level: Annotated[str, typer.Option(help="edge, or node: whole heads and MLPs.")] = "edge",
    target: Annotated[float, typer.Option(help="Faithfulness to reach, between 0 and 1.")] = 0.85,
    exact: Annotated[int, typer.Option(min=0, help="Edges also run exactly, beside their estimate.")] = 24,
    random: Annotated[int, typer.Option(min=0, help="Random circuits of equal size.")] = 50,
    metric: Metric = "logit_diff",
    source: Source = Source(),
    given: Prompts = Prompts(),
    out: Out = None,
    batch_size: BatchSize = 8,
    quiet: Quiet = False,
) -> None:
    """Find the edges that carry the answer on one half of the episodes, and measure them on the other."""
    one_of("method", method, ("EAP-IG", "EAP", "exact"))
    one_of("search", search, ("threshold", "greedy", "prune"))
    one_of("level", level, ("edge", "node"))
    if not 0 < target < 1:
        raise OptionError(f"target must lie between 0 and 1; got {target}. 0.85 keeps what carries 85 % of the difference.")
    _check_common(pairs, metric)
    folder = check_folder(out)
    prompts = given.asked()
    few = prompts.draw(least=8, one_length=True)
    loaded = source.load(quiet)
    from mechicl.analysis.circuits.tracing import CircuitPlan, circuit_cost, search_circuit
    from mechicl.prompts.corrupt import minimal_pairs
    from mechicl.results import Trace
    from mechicl.views.trace_story import circuit_sentence, trace_notes

    find, prove = (minimal_pairs(loaded, half, pairs, seed=given.seed) for half in (few[::2], few[1::2]))  # type: ignore[arg-type]
    plan = CircuitPlan(method, search, level, target, exact, random, metric)  # type: ignore[arg-type]
    typer.echo(str(circuit_cost(loaded, find, prove, plan, batch_size=batch_size)), err=True)
    scores, found, curve = search_circuit(
        loaded, find, prove, plan, seed=given.seed, batch_size=batch_size, task=prompts.name, progress=not quiet
    )
    trace = Trace(None, scores, found, curve, pairs, find.n, prove.n)
    typer.echo(circuit_sentence(found))
    if scores is not None and scores.agreement is not None:
        typer.echo(f"{method} beside exact runs: {scores.agreement}.")
    typer.echo(f"{'edge':<26} {'score':>7}   {'lost without it (95 % interval)':<35} sender acts at")
    for row in found.to_frame().to_dict("records"):
        lost = f"{row['loss']:>6.3f}  ({row['loss_low']:.3f} to {row['loss_high']:.3f})"
        typer.echo(f"{row['edge']:<26} {row['score']:>7.3f}   {lost:<35} {row['place']}")
    _few(min(find.n, prove.n))
    for note in trace_notes(trace):
        typer.echo(note, err=True)
    if folder is not None:
        command = f"mechicl circuit --model {source.model} {prompts.flags} --pairs {pairs} --method {method}"
        _write_circuit(
            folder, trace, f"{command} --search {search} --level {level} --target {target} --metric {metric} --out {folder.name}"
        )


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """ "0-3,7" -> (0, 1, 2, 3, 7); None for all.

    Raises:
        OptionError: not numbers or ranges.
    """
    if text is None:
        return None
    found: list[int] = []
    for part in (p.strip() for p in text.split(",")):
        first, dash, last = part.partition("-")
        ends = [first, last] if dash else [first]
        if not all(e.isascii() and e.isdigit() for e in ends) or int(ends[-1]) < int(ends[0]):
            raise OptionError(f"layers must be numbers or ranges separated by commas, counted from 0; got {text!r}. E.g. --layers 0-3,7.")
        found += range(int(ends[0]), int(ends[-1]) + 1)
    return tuple(dict.fromkeys(found))


def _sites(text: str) -> list[str]:
    """Names of sites, each once; refused where there is none of that name."""
    from mechicl.analysis.patching.cells import SITES

    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise OptionError(f"sites must be some of {', '.join(SITES)}; got none. Pick some of them.")
    for site in found:
        one_of("sites", site, SITES)
    return list(dict.fromkeys(found))


def _groups(sites: list[str], by: str | None) -> list[tuple[str, list[str]]]:
    """Sites that are patched in the same way, together: heads by head and the rest by span, unless one way is asked for."""
    from mechicl.analysis.patching.cells import HEADS

    if by is not None:
        return [(by, sites)]
    heads = [site for site in sites if site in HEADS]
    return [group for group in (("span", [site for site in sites if site not in heads]), ("head", heads)) if group[1]]


def _check_common(pairs: str, metric: str) -> None:
    from mechicl.analysis.patching.metrics import MetricName
    from mechicl.prompts.corrupt import How

    one_of("pairs", pairs, get_args(How))
    one_of("metric", metric, get_args(MetricName))


def _few(n: int) -> None:
    """Says so where intervals over pairs mean little."""
    if n < ENOUGH:
        typer.echo(f"Only {n} pairs: read the intervals with care, or draw more with --episodes.", err=True)


def _part(folder: Path | None, way: str, groups: int) -> Path | None:
    """Where the finished cells of one way of patching are kept."""
    return None if folder is None else folder if groups == 1 else folder / way


def _list_cells(result: Any, top: int) -> None:
    """The strongest cells of every site."""
    for name, site in result.sites.items():
        typer.echo(f"{name:<28} value  95 % interval      p (corrected)  raw mean ({result.unit})")
        for labels in result.top(name, top):
            at = site.index(**dict(zip(site.axes, labels, strict=True)))
            words = " ".join(
                f"{axis} {label}" if axis in ("layer", "head", "pos") else str(label) for axis, label in zip(site.axes, labels, strict=True)
            )
            star = " *" if site.p_corrected[at] < 0.05 else ""
            typer.echo(
                f"  {words:<25} {site.value[at]:>6.3f}  {site.low[at]:>6.3f} to {site.high[at]:>6.3f}   {site.p_corrected[at]:<10.2g}  {site.raw[(slice(None), *at)].mean():>8.3f}{star}"
            )


def _write_effects(folder: Path, results: list[Any], command: str) -> None:
    """effects.csv with every cell, effects.html with the figures."""
    import pandas as pd

    from mechicl.views import captions, trace_story
    from mechicl.views.page import PageContent, block, write_page
    from mechicl.views.plots import plot

    folder.mkdir(exist_ok=True)
    write_text(
        folder / "effects.csv", pd.concat([r.to_frame() for r in results], ignore_index=True).to_csv(index=False, lineterminator="\n")
    )
    blocks = tuple(block(f"patching-{k}", "", plot(r), captions.about_patching(r), r.to_frame()) for k, r in enumerate(results))
    told = [sentence(r) for r in results for sentence in (trace_story.route_sentence, trace_story.heads_sentence)]
    first = results[0]
    title = f"Which activations carry the answer of {first.provenance.model} on {first.provenance.task}"
    notes = tuple(dict.fromkeys(note for r in results for note in r.notes))
    page = write_page(folder / "effects.html", PageContent(title, tuple(t for t in told if t), blocks, first.provenance, command, notes))
    typer.echo(f"Written to {page}.", err=True)


def _write_circuit(folder: Path, trace: Any, command: str) -> None:
    """circuit.csv, curve.csv, edges.csv, and circuit.html with the figures."""
    from mechicl.views import trace_story
    from mechicl.views.page import PageContent, write_page
    from mechicl.views.traces import circuit_blocks

    folder.mkdir(exist_ok=True)
    for name, part in (("circuit", trace.circuit), ("curve", trace.curve), ("edges", trace.edge_scores)):
        if part is not None:
            write_text(folder / f"{name}.csv", part.to_frame().to_csv(index=False, lineterminator="\n"))
    p = trace.circuit.provenance
    content = PageContent(
        f"The circuit of {p.model} on {p.task}",
        (trace_story.circuit_sentence(trace.circuit),),
        tuple(circuit_blocks(trace)),
        p,
        command,
        tuple(trace_story.trace_notes(trace)),
    )
    typer.echo(f"Written to {write_page(folder / 'circuit.html', content)}.", err=True)
