"""The command line. Every command imports what it needs when it runs, so that `mechicl --help` is quick.

    mechicl report --model demo --task concepts --out report.html
    mechicl heads --model demo
    mechicl ablate --model demo --top 4 --by induction
    mechicl doctor Qwen/Qwen2.5-VL-3B-Instruct
    mechicl train vlm --family qwen2_5_vl --out runs/organism
    mechicl sweep spec.toml --out runs/sweep --workers 2

What can be refused is refused before a model is loaded. Numbers go to stdout, everything else to stderr; a mistake is one line and exit code 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from mechicl.errors import MechiclError, OptionError

Task = Literal["concepts", "digits"]
How = Literal["zero", "mean", "resample"]


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

Model = Annotated[str, typer.Option("--model", "-m", help='"demo" (the bundled model), a folder, or a hub id.', rich_help_panel="Model")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...", rich_help_panel="Model")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel="Model")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.", rich_help_panel="Model")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own Python code from the hub.", rich_help_panel="Model")]
TaskName = Annotated[
    Task,
    typer.Option(
        "--task", "-t", help="concepts: pictures of concepts nobody has met; digits: real handwritten digits.", rich_help_panel="Episodes"
    ),
]
Episodes = Annotated[int, typer.Option("--episodes", "-n", min=1, help="How many prompts.", rich_help_panel="Episodes")]
Classes = Annotated[int, typer.Option(min=2, help="Classes in each prompt.", rich_help_panel="Episodes")]
Shots = Annotated[int, typer.Option(min=1, help="Examples of each class.", rich_help_panel="Episodes")]
Size = Annotated[int, typer.Option(min=8, help="Side of the pictures, pixels.", rich_help_panel="Episodes")]
Seed = Annotated[int, typer.Option(min=0, help="Decides episodes, nulls, random heads.", rich_help_panel="Episodes")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts per forward pass.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Off = Annotated[How, typer.Option("--how", help="How heads are switched off.")]


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


@app.command()
def report(
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")],
    model: Model = "demo",
    task: TaskName = "concepts",
    episodes: Episodes = 64,
    classes: Classes = 4,
    shots: Shots = 2,
    size: Size = 56,
    seed: Seed = 0,
    how: Off = "mean",
    threshold: Annotated[float, typer.Option(min=0.0, max=0.99, help="Least score of a head that is switched off.")] = 0.1,
    device: Device = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    batch_size: BatchSize = 8,
    quiet: Quiet = False,
) -> None:
    """Find the heads, prove them, and write one HTML page that opens with no network."""
    from mechicl.views.report import ReportContent, check_writable, write_report

    target = check_writable(out)
    few = _draw(task, episodes, classes, shots, size, seed, least=8)
    loaded = _load(model, device, dtype, revision, trust_remote_code, quiet)
    from mechicl.analysis.study import find_and_prove

    study = find_and_prove(
        loaded,
        few,
        how=how,
        threshold=threshold,
        seed=seed,
        batch_size=batch_size,
        task=_task_name(task, classes, shots),
        growth=_growth(model),
        progress=not quiet,
    )
    command = f"mechicl report --model {model} --task {task} --episodes {episodes} --classes {classes} --shots {shots} --size {size} --seed {seed} --how {how} --out {out.name}"
    written = write_report(target, ReportContent(study, command=command))
    from mechicl.views.story import headline

    typer.echo(headline(study))
    typer.echo(f"Written to {written} ({written.stat().st_size / 1e6:.1f} MB).", err=True)


@app.command()
def heads(
    model: Model = "demo",
    task: TaskName = "concepts",
    episodes: Episodes = 64,
    classes: Classes = 4,
    shots: Shots = 2,
    size: Size = 56,
    seed: Seed = 0,
    top: Annotated[int, typer.Option(min=1, help="Heads to list per score.")] = 5,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write every score of every head as CSV.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    batch_size: BatchSize = 8,
    quiet: Quiet = False,
) -> None:
    """Score every head, each score with its null, and list the best."""
    from mechicl.views.report import check_writable

    target = check_writable(out) if out is not None else None
    few = _draw(task, episodes, classes, shots, size, seed)
    loaded = _load(model, device, dtype, revision, trust_remote_code, quiet)
    from mechicl.analysis.heads import score_heads

    scores = score_heads(loaded, few, seed=seed, batch_size=batch_size, task=_task_name(task, classes, shots), progress=not quiet)
    typer.echo("score                   head     value  95 % interval     null   p (Holm)")
    for name, score in scores.scores.items():
        for layer, head in score.top(top):
            at = (layer, head)
            mark = " *" if score.p_corrected[at] < 0.05 else ""
            typer.echo(
                f"{name:<22}  {f'{layer}.{head}':<6} {score.value[at]:>7.3f}  {score.low[at]:>6.3f} to {score.high[at]:>6.3f}  {score.null[at]:>6.3f}   {score.p_corrected[at]:.2g}{mark}"
            )
    if target is not None:
        _write_text(target, scores.to_frame().to_csv(index=False, lineterminator="\n"))
        typer.echo(f"Written to {target}.", err=True)
    for note in scores.notes:
        typer.echo(note, err=True)


@app.command()
def ablate(
    chosen: Annotated[str | None, typer.Option("--heads", help="Heads as layer.head, e.g. 1.3,1.4, counted from 0.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="The best heads by --by, ranked on other episodes.")] = None,
    by: Annotated[str, typer.Option(help="The score that ranks --top.")] = "induction",
    model: Model = "demo",
    task: TaskName = "concepts",
    episodes: Episodes = 64,
    classes: Classes = 4,
    shots: Shots = 2,
    size: Size = 56,
    seed: Seed = 0,
    how: Off = "mean",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write every accuracy as CSV.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    batch_size: BatchSize = 8,
    quiet: Quiet = False,
) -> None:
    """Switch heads off, beside as many random heads, and see what happens to the answers."""
    from mechicl.views.report import check_writable

    if (chosen is None) == (top is None):
        raise OptionError(
            f"heads must be given as --heads or as --top; got {'neither' if chosen is None else 'both'}. E.g. --heads 1.3,1.4 or --top 4 --by induction."
        )
    wanted = parse_heads(chosen) if chosen is not None else ()
    target = check_writable(out) if out is not None else None
    if top is not None:
        _check_score(by)
    few = _draw(task, episodes * (2 if top else 1), classes, shots, size, seed)
    loaded = _load(model, device, dtype, revision, trust_remote_code, quiet)
    from mechicl.analysis.ablation import ablate as switch_off
    from mechicl.analysis.heads import score_heads
    from mechicl.views.story import against_random, percent, points
    from mechicl.views.tables import ablation_frame

    common: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "task": _task_name(task, classes, shots), "progress": not quiet}
    if top is not None:
        scores = score_heads(loaded, few[::2], scores=(by,), **common)
        wanted, few = tuple(scores.top(by, top)), few[1::2]
    result = switch_off(loaded, few, wanted, how=how, **common)
    typer.echo(f"intact               {percent(result.intact.accuracy)}, chance {100 * result.intact.chance:.0f} %, n = {result.n}")
    typer.echo(
        f"off: {' '.join(f'{a}.{b}' for a, b in wanted):<15} {percent(result.chosen.accuracy)}, {points(result.chosen.change)}, McNemar p = {result.chosen.mcnemar_p:.2g}"
    )
    for cell in result.singles if len(wanted) > 1 else ():
        typer.echo(f"only {f'{cell.heads[0][0]}.{cell.heads[0][1]}':<15} {percent(cell.accuracy)}, {points(cell.change)}")
    if result.random:
        typer.echo(against_random(result))
    typer.echo(result.verdict)
    if target is not None:
        _write_text(target, ablation_frame(result).to_csv(index=False, lineterminator="\n"))
        typer.echo(f"Written to {target}.", err=True)


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help='"demo", a folder, or a hub id.')],
    device: Device = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Is this model, on this machine, in this dtype, safe to draw conclusions from? Exit code 1 if a check fails."""
    loaded = _load(model, device, dtype, revision, trust_remote_code, quiet=True, check=False)
    from mechicl.models.doctor import diagnose

    checks = diagnose(loaded)
    for check in checks:
        typer.echo(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.value:.3g} {check.unit} (limit {check.limit:.3g})")
        if not check.ok or check.value != check.value:
            typer.echo(f"      {check.advice}")
    failed = sum(not check.ok for check in checks)
    typer.echo(f"{len(checks) - failed} of {len(checks)} checks passed.", err=True)
    if failed:
        raise typer.Exit(1)


@training.command("vlm")
def train_vlm(
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder.")],
    family: Annotated[str, typer.Option(help="qwen2_5_vl, qwen3_vl, llava, internvl, gemma3, smolvlm, ...")] = "qwen2_5_vl",
    preset: Annotated[str, typer.Option(help="demo, or micro for a quick try.")] = "demo",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train a small vision-language model of transformers' own class to learn from the examples in its prompt."""
    from mechicl.training.vlm import train

    folder = train(family, preset=preset, out=out, seed=seed, resume=resume, progress=not quiet)
    typer.echo(str(folder))


@training.command("toy")
def train_toy(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run's folder.")] = None,
    preset: Annotated[
        str,
        typer.Option(help="cpu, cpu_multimodal (ours, minutes); huang2026, huang2026_multimodal, reddy2024 (the papers', hours); modern."),
    ] = "cpu",
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, e.g. K=1024, positions=alibi, lr=3e-4; may be repeated.")
    ] = None,
    stop: Annotated[str | None, typer.Option(help='Stop early, e.g. "accuracy_ic>=0.95".')] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; 1 gives the same bits every time.")] = 1,
    device: Device = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Through torch.compile; needs a C++ compiler on a CPU.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe and stop.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train a toy transformer on sequences of vectors and watch in-context learning grow."""
    from mechicl.training.toy_recipe import from_words

    chosen = from_words(preset, changes or (), seed=seed, stop=stop)
    if dry_run:
        import json

        typer.echo(json.dumps(chosen.to_json(), indent=1))
        return
    if out is None:
        raise OptionError("out must be given; got none. Add --out FOLDER, or --dry-run to see the recipe.")
    from mechicl.training.toy import train_toy as train

    run = train(chosen, out, resume=resume, progress=not quiet, threads=threads, device=device, compile=compiled)
    last = run.table.iloc[-1]
    for name in ("loss", "accuracy", "accuracy_ic", "accuracy_ic2", "accuracy_iw", "cla_ic"):
        typer.echo(f"{name:<13} {last[name]:.3f}")
    typer.echo(f"Step {int(last['step'])}; {out}", err=True)


@app.command()
def sweep(
    spec: Annotated[Path, typer.Argument(help="A TOML file of settings, grids and seeds; docs/sweeps.md has the format.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The sweep's folder; one that is there already is continued.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", "-w", min=1, help="Processes on this machine; by default one a core.")] = None,
    together: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many cells of the same shapes in one batched step; by default 4 on a CPU, 64 on a GPU."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each worker; by default the cores are shared out.")] = None,
    device: Device = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep every cell's checkpoints; a cell that was in flight goes on from its last one.")
    ] = False,
    ray_address: Annotated[str | None, typer.Option(help='A Ray cluster: "auto", host:port, or "local" to start one here.')] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained and about how long it takes, and stop.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train toys over a grid of settings and seeds. Killed, it goes on where it was; exit code 1 if a cell failed."""
    from mechicl.training import sweep as sweeps

    workers = workers or sweeps.cores()
    if dry_run:
        from mechicl.training.sweep_cost import outlook

        for line in outlook(spec, out, together=together, workers=workers, threads=threads, device=device):
            typer.echo(line)
        return
    if out is None:
        raise OptionError("out must be given; got none. Add --out FOLDER, or --dry-run to see what would be trained.")
    table = sweeps.run(
        spec,
        out,
        workers=workers,
        together=together,
        threads=threads,
        device=device,
        keep_models=keep_models,
        ray_address=ray_address,
        progress=not quiet,
    )
    failed = table.attrs["failed"]
    for reason in failed.values():
        typer.echo(f"No result: {reason}", err=True)
    typer.echo(str(out / "results.parquet") if len(table) else str(out))
    if failed:
        typer.echo(f"{len(failed)} cells have no result; {out / 'failed'} says why.", err=True)
        raise typer.Exit(1)


def parse_heads(text: str) -> tuple[tuple[int, int], ...]:
    """ "1.3,1.4" -> ((1, 3), (1, 4)).

    Raises:
        OptionError: not layer.head pairs, or the same head twice.
    """
    pairs = [part.strip() for part in text.split(",") if part.strip()]
    numbers = [part.split(".") for part in pairs]
    if not pairs or not all(len(n) == 2 and all(x.isascii() and x.isdigit() for x in n) for n in numbers):
        raise OptionError(f"heads must be layer.head pairs separated by commas, counted from 0; got {text!r}. E.g. --heads 1.3,1.4.")
    found = tuple((int(a), int(b)) for a, b in numbers)
    if len(set(found)) != len(found):
        raise OptionError(f"heads must differ; got {text!r}. Name each head once.")
    return found


def _draw(task: str, n: int, classes: int, shots: int, size: int, seed: int, *, least: int = 1) -> list[Any]:
    if n < least:
        raise OptionError(f"episodes must be at least {least}, half to find heads and half to prove them; got {n}. Ask for more.")
    from mechicl.data import concepts, digits

    return (concepts if task == "concepts" else digits).draw(n, classes=classes, shots=shots, size=size, seed=seed)


def _task_name(task: str, classes: int, shots: int) -> str:
    return f"{task}, {classes} classes × {shots} {'shot' if shots == 1 else 'shots'}"


def _load(name: str, device: str | None, dtype: str, revision: str | None, trust: bool, quiet: bool, *, check: bool = True) -> Any:
    import mechicl

    if not quiet:
        typer.echo(f"Loading {name} ...", err=True)
    return mechicl.load(name, device=device, dtype=dtype, revision=revision, trust_remote_code=trust, check=check)


def _check_score(name: str) -> None:
    from mechicl.analysis.scores import SCORES

    if name not in SCORES:
        raise OptionError(f"by must be one of {', '.join(SCORES)}; got {name!r}. Pick one of them.")


def _growth(name: str) -> Any:
    """The training curve that lies beside a model trained here; None for any other model."""
    from mechicl.errors import CheckpointError
    from mechicl.models.load import demo_folder
    from mechicl.training.growth import read_growth

    folder = demo_folder() if name == "demo" else Path(name).expanduser()
    for place in (folder, folder.parent):
        if (place / "growth.json").is_file():
            try:
                return read_growth(place)
            except CheckpointError as error:
                typer.echo(f"No growth plot: {error}", err=True)
    return None


def _write_text(target: Path, text: str) -> None:
    """Written under a temporary name, then renamed."""
    import os
    import tempfile

    handle, temporary = tempfile.mkstemp(prefix=".mechicl-", dir=target.parent)
    with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
        file.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, target)
