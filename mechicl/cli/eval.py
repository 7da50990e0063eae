"""`mechicl eval lcl`: link-context learning of a model, on made-up or local data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mechicl.cli.options import BatchSize, Quiet, Seed, Size, Source, check_folder, one_of, write_text
from mechicl.errors import OptionError

PROTOCOLS = ("isekai-10", "isekai-pair", "class-folders")
LISTS = {"isekai-10": "ISEKAI-10", "isekai-pair": "ISEKAI-pair"}

Data = Annotated[str, typer.Option(help='"generated", or a folder: ISEKAI lists with their pictures, or a folder of pictures for each class.', rich_help_panel="Episodes")]  # fmt: skip
Protocol = Annotated[str, typer.Option(help="isekai-10: unreal against its real partner. isekai-pair: unreal against unreal. class-folders: neighbours in the list, fixed examples.", rich_help_panel="Episodes")]  # fmt: skip
Shots = Annotated[str, typer.Option(help="Examples of each class, separated by commas.", rich_help_panel="Episodes")]
Labels = Annotated[str, typer.Option(help="own: the classes' names. positive: a random string for the positive class. words: made-up words for both. auto: words for the bundled model.", rich_help_panel="Episodes")]  # fmt: skip
Words = Annotated[
    str, typer.Option("--prompt", help="published, short or sentences. auto: short for the bundled model.", rich_help_panel="Episodes")
]
HeldOut = Annotated[Path | None, typer.Option(help="A list of held-out classes, for a folder of classes.", rich_help_panel="Episodes")]


def lcl(
    source: Source = Source(),
    data: Data = "generated",
    protocol: Protocol = "isekai-10",
    shots: Shots = "0,1,2,4,8,16",
    questions: Annotated[int, typer.Option("--questions", "-n", min=2, help="How many.", rich_help_panel="Episodes")] = 100,
    labels: Labels = "auto",
    prompt: Words = "auto",
    held_out: HeldOut = None,
    size: Size = 56,
    seed: Seed = 0,
    corruption: Annotated[bool, typer.Option("--corruption", help="Also: 0 to 100 % of the labels wrong.")] = False,
    position: Annotated[bool, typer.Option("--position", help="Also: only a third of the examples says anything.")] = False,
    renamed: Annotated[str | None, typer.Option("--renamed", help='Also: known things under other names. swap ("apple" called "orange" and the other way round), outside (names of other things) or novel (made-up words). Does the answer follow the link or the prior?')] = None,
    at: Annotated[int, typer.Option(min=3, help="Examples of each class for --corruption and --position.")] = 6,
    write: Annotated[bool, typer.Option("--write/--likelihood", help="Let the model write its answers, or compare candidates only.")] = True,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; by default the longest name and 16 more.")] = None,
    rule: Annotated[str, typer.Option(help='published: the both-names rule. longest: "cactus boxer" never counts as "cactus".')] = "published",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for answers, tables and an HTML page; the same command goes on where it was.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    batch_size: BatchSize = 8,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Does the model call a new thing by the name that its examples give? Over shots, beside baselines."""
    one_of("protocol", protocol, PROTOCOLS)
    one_of("labels", labels, ("auto", "own", "positive", "words"))
    one_of("prompt", prompt, ("auto", "published", "short", "sentences"))
    one_of("rule", rule, ("published", "longest"))
    if renamed is not None:
        one_of("renamed", renamed, ("swap", "outside", "novel"))
    counts, folder = parse_shots(shots), check_folder(out)
    bundled = source.model == "demo"
    found, given = read_data(data, protocol, max(*counts, at if corruption or position else 1), held_out, size, seed)
    if given and labels not in ("auto", "own"):
        raise OptionError(f"labels must be own for a published list, which names its classes; got {labels!r}. Leave --labels away.")
    from mechicl.data import link_context

    kind: Any = "own" if given else ("words" if bundled else "own") if labels == "auto" else labels
    words = {"published": link_context.PUBLISHED, "short": link_context.SHORT, "sentences": link_context.SENTENCES}[
        ("short" if bundled else "published") if prompt == "auto" else prompt
    ]
    asked: dict[str, Any] = {
        "protocol": "episodes" if given else protocol,
        "n": questions,
        "labels": kind,
        "prompt": words,
        "size": size,
        "seed": seed,
    }
    from mechicl.analysis.link.evaluate import evaluate_link, link_cost, link_questions
    from mechicl.analysis.link.prior import informative_position, label_corruption

    loaded = source.load(quiet)
    common: dict[str, Any] = {"generate": write, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    if dry_run or not quiet:
        typer.echo(str(link_cost(loaded, found, shots=counts, **asked, **common)), err=True)
    if dry_run:
        return
    common |= {"seed": seed, "task": f"{data if data == 'generated' else Path(data).name}, {protocol}", "progress": not quiet}
    if folder is not None:
        folder.mkdir(exist_ok=True)
    results = [evaluate_link(loaded, found, shots=counts, rule=rule, out=_part(folder, "shots"), **(asked | common))]  # type: ignore[arg-type]
    for wanted, name, run in ((corruption, "corruption", label_corruption), (position, "position", informative_position)):
        if wanted:
            results.append(run(loaded, link_questions(found, at, **asked), out=_part(folder, name), **common))
    for result in results:
        _list(result)
    if renamed is not None:
        results.append(_renamed(loaded, found, counts, renamed, asked, _part(folder, "renamed"), common))
    if folder is not None:
        line = f"mechicl eval lcl --model {source.model} --data {data} --protocol {protocol} --shots {shots} --questions {questions} --labels {kind} --size {size} --seed {seed}"
        line += "" if renamed is None else f" --renamed {renamed}"
        line += "".join(
            f" --{name}" for name, wanted in (("corruption", corruption), ("position", position), ("likelihood", not write)) if wanted
        )
        _write(folder, results, f"{line} --out {folder.name}")


def parse_shots(text: str) -> tuple[int, ...]:
    """ "0,2,4" -> (0, 2, 4).

    Raises:
        OptionError: not numbers, or one of them twice.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() for part in parts):
        raise OptionError(f"shots must be numbers of examples of each class, separated by commas; got {text!r}. E.g. --shots 0,2,4,8,16.")
    found = [int(part) for part in parts]
    if len(set(found)) < len(found):
        raise OptionError(f"shots must differ; got {text!r}. Name each number once: --shots {','.join(map(str, sorted(set(found))))}.")
    return tuple(sorted(found))


def read_data(data: str, protocol: str, shots: int, held_out: Path | None, size: int, seed: int) -> tuple[Any, bool]:
    """A pool, or the questions of a published list; and whether it is the latter."""
    from mechicl.data.link_context import generated_pool

    if data == "generated":
        return generated_pool(seed, per_class=max(32, shots + 4), size=size), False
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise OptionError(f"data must be 'generated' or a folder; got {data!r}. Check the path.")
    if protocol == "class-folders":
        from mechicl.data.class_folders import load_class_folders

        loaded = load_class_folders(folder, held_out=held_out, least=shots + 1, size=size, strict=False)
        _report(loaded.report)
        return loaded.held_out or loaded.train, False
    from mechicl.data.isekai import load_isekai

    lists = load_isekai(folder, lists=[LISTS[protocol]], strict=False)
    _report(lists.report)
    return list(lists[LISTS[protocol]]), True


def _report(report: Any) -> None:
    if report.problems:
        typer.echo(str(report), err=True)


def _renamed(
    loaded: Any, found: Any, counts: tuple[int, ...], how: Any, asked: dict[str, Any], out: Path | None, common: dict[str, Any]
) -> Any:
    """The link against the prior, listed. The classes keep their own names: those that the model may know."""
    from mechicl.analysis.link.evaluate import link_questions
    from mechicl.analysis.link.rename import link_or_prior

    own = asked | ({} if asked["protocol"] == "episodes" else {"labels": "own"})
    result = link_or_prior(loaded, link_questions(found, max(1, *counts), **own), how=how, shots=counts, out=out, **common)
    typer.echo(
        f"known things renamed ({how}): n = {result.n} queries; without examples {_cell(result.known)} are called by their known name"
    )
    typer.echo(f"{'':<26}{'link':<24}{'prior':<24}log p(link) - log p(prior), nats")
    for row in result.rows:
        if row.names == "renamed":
            typer.echo(
                f"{f'{row.shots} shots':<26}{_cell(row.link):<24}{_cell(row.prior):<24}{_cell(row.preference)}, p = {row.holm_p:.2g}"
            )
    for note in result.notes:
        typer.echo(note, err=True)
    return result


def _part(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / name


def _list(result: Any) -> None:
    """The table of one evaluation."""
    skipped = f", {len(result.skipped)} skipped" if result.skipped else ""
    typer.echo(f"{result.axis}, {result.protocol}: n = {result.n} queries, the same in every setting{skipped}; 95 % intervals")
    typer.echo(f"{'':<26}{'written':<24}{'positive':>9}{'negative':>9}   {'likelihood':<24}{'copy any':>9}{'prototype':>10}")
    for k, row in enumerate(result.rows):
        beside = [next((b.accuracy[k].value for b in result.baselines if b.name == name), float("nan")) for name in ("copy any label", "nearest prototype")]  # fmt: skip
        recalls = (
            [row.positive_recall, row.negative_recall]
            if row.accuracy is not None
            else [row.likelihood_positive_recall, row.likelihood_negative_recall]
        )
        cells = "".join(f"{e.value:>9.3f}" for e in recalls)
        typer.echo(f"{row.setting:<26}{_cell(row.accuracy):<24}{cells}   {_cell(row.likelihood):<24}{beside[0]:>9.3f}{beside[1]:>10.3f}")
    told = [c for c in result.changes if c.holm_p < 0.05 and c.a == result.rows[0].setting and c.measure == result.changes[0].measure]
    for c in told:
        typer.echo(
            f"{c.b} minus {c.a} ({c.measure}): {c.change.value:+.3f} [{c.change.low:+.3f}, {c.change.high:+.3f}], McNemar p = {c.holm_p:.2g} (Holm)"
        )
    for note in result.notes:
        typer.echo(note, err=True)


def _cell(e: Any) -> str:
    return "-" if e is None else f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"


def _write(folder: Path, results: list[Any], command: str) -> None:
    """link.csv with every number, link.html with the figures."""
    import pandas as pd

    from mechicl.results import LinkPrior
    from mechicl.views.link import about_link, about_prior
    from mechicl.views.page import PageContent, block, write_page
    from mechicl.views.plots import plot

    priors = [result for result in results if isinstance(result, LinkPrior)]
    results = [result for result in results if not isinstance(result, LinkPrior)]
    frames = [result.to_frame().assign(axis=result.axis) for result in results]
    write_text(folder / "link.csv", pd.concat(frames, ignore_index=True).to_csv(index=False, lineterminator="\n"))
    blocks = tuple(block(f"link-{k}", "", plot(r), about_link(r), r.to_frame(), raw=r.answers_frame()) for k, r in enumerate(results))
    blocks += tuple(block(f"prior-{k}", "", plot(r), about_prior(r), r.to_frame()) for k, r in enumerate(priors))
    for r in priors:
        write_text(folder / "prior.csv", r.to_frame().to_csv(index=False, lineterminator="\n"))
    first = results[0]
    best = first.rows[-1]
    told = (
        f"With {best.setting} of each class {_cell(best.accuracy or best.likelihood)} of {first.n} queries are called by the right name.",
    )
    notes = tuple(dict.fromkeys(note for r in (*results, *priors) for note in r.notes))
    content = PageContent(f"Link-context learning of {first.provenance.model}", told, blocks, first.provenance, command, notes)
    typer.echo(f"Written to {write_page(folder / 'link.html', content)}.", err=True)
