"""`mechicl study huang2026`: a published protocol on any model, one command."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mechicl.cli.options import BatchSize, Device, Dtype, Model, Quiet, Revision, Seed, Trust, check_folder, load_model
from mechicl.cli.workers import RayAddress, Workers
from mechicl.errors import OptionError

EPISODES, HEADS, LORA = "Episodes", "Heads", "Fine-tuning"


def huang2026(
    model: Model = "demo",
    data: Annotated[Path | None, typer.Option(help="Folder of VL-ICL Bench, or its open_mi. Left out: generated pictures of concepts nobody has met.", rich_help_panel=EPISODES)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The study's folder; the same command goes on where it was.")] = None,
    shots: Annotated[int, typer.Option(min=1, help="Examples of each of the two classes.", rich_help_panel=EPISODES)] = 2,
    rank: Annotated[int, typer.Option(min=4, help="Episodes to rank heads on (published: 16).", rich_help_panel=EPISODES)] = 32,
    episodes: Annotated[int, typer.Option("--episodes", "-n", min=4, help="Other episodes, to switch heads off on (published: 50, the ranking's among them).", rich_help_panel=EPISODES)] = 100,
    size: Annotated[int | None, typer.Option(min=8, help="Longest side of the pictures, pixels.", rich_help_panel=EPISODES)] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Heads of a set. Published 5; fewer in a model of few heads.", rich_help_panel=HEADS)] = None,
    random: Annotated[int, typer.Option(min=0, help="Draws of random heads beside each set; 19 or more for p = 0.05.", rich_help_panel=HEADS)] = 20,
    dose_random: Annotated[int, typer.Option(min=0, help="Draws beside each point of a dose curve.", rich_help_panel=HEADS)] = 10,
    skip: Annotated[list[str] | None, typer.Option(help="Leave out: lora, dose, ours. Give it once for each.", rich_help_panel=HEADS)] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of LoRA (published: 500).", rich_help_panel=LORA)] = 500,
    train: Annotated[int, typer.Option(min=1, help="Episodes to learn from (published: 100).", rich_help_panel=LORA)] = 100,
    held_out: Annotated[int, typer.Option(min=4, help="Other episodes, to measure on (published: 16).", rich_help_panel=LORA)] = 16,
    every: Annotated[int, typer.Option(min=1, help="Steps between measures (published: 25).", rich_help_panel=LORA)] = 25,
    lr: Annotated[float, typer.Option(help="Learning rate, constant (published: 2e-5).", rich_help_panel=LORA)] = 2e-5,
    targets: Annotated[str, typer.Option(help="Linear layers that get adapters, by the last part of their names.", rich_help_panel=LORA)] = "q_proj,k_proj,v_proj,o_proj",
    bf16: Annotated[bool, typer.Option("--bf16", help="Train in bfloat16.", rich_help_panel=LORA)] = False,
    save_memory: Annotated[bool, typer.Option("--save-memory", help="Compute activations again in the backward pass.", rich_help_panel=LORA)] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Time a few episodes, say what the study would take, and stop.")] = False,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    batch_size: BatchSize = 8,
    workers: Workers = 0,
    ray_address: RayAddress = None,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Previous-token and induction heads as Huang et al. 2026 rank them and switch them off, with the controls that were missing."""
    if out is None and not preview:
        raise OptionError("out must be a folder; got none. Name one with --out, or ask for a --preview.")
    if ray_address is not None and not workers:
        raise OptionError("ray-address must come with --workers; got 0 workers. Say how many share the episodes.")
    folder = check_folder(out)
    from mechicl.studies.huang2026 import Options, preview_study, run, study_episodes
    from mechicl.studies.huang2026_tuning import TuningOptions

    lora = TuningOptions(steps=steps, train=train, held_out=held_out, every=every, lr=lr, targets=tuple(t.strip() for t in targets.split(",") if t.strip()), bf16=bf16, save_memory=save_memory)  # fmt: skip
    options = Options(shots=shots, rank=rank, episodes=episodes, top=top, n_random=random, dose_draws=dose_random, skip=tuple(skip or ()), size=size, seed=seed, lora=lora)  # type: ignore[arg-type]  # fmt: skip
    drawn, task = study_episodes(data, options)  # refuses a folder before a model is loaded
    loaded = load_model(model, device, dtype, revision, trust_remote_code, quiet)
    if preview:
        typer.echo(str(preview_study(loaded, drawn, options=options, batch_size=batch_size)))
        return
    assert folder is not None
    command = shlex.join(["mechicl", *sys.argv[1:]]) if sys.argv[1:] else "mechicl study huang2026"
    name = (
        model if revision is None and not trust_remote_code else ""
    )  # else the fine-tuning copies the model in memory: a name would load another
    study = run(
        loaded,
        drawn,
        folder,
        options=options,
        batch_size=batch_size,
        command=command,
        task=task,
        name=name,
        workers=workers,
        address=ray_address,
        device=device,
        dtype=dtype,
        progress=not quiet,
    )
    told(study)
    typer.echo(str(folder / "study.html"))


def told(study: Any) -> None:
    """The numbers of a study, as lines."""
    for key in ("ph_published", "previous_token", "ih_published", "induction"):
        heads = study.heads.top(key, 5)
        typer.echo(f"{key.replace('_', ' '):<18}" + "  ".join(f"{a}.{b} {study.heads[key].value[a, b]:.3f}" for a, b in heads))
    typer.echo(f"\n{'n = ' + str(study.n):<40}{'first token':<24}{'whole label':<24}{'CLA':>6}{'random heads':>14}{'p':>8}")
    for row in study.knock_outs.rows:
        beside = "" if row.random_whole is None else f"{row.random_whole.value:.3f}"
        p = "" if row.p_whole != row.p_whole else f"{row.p_whole:.3f}"
        name = f"{row.name} off" if row.heads else row.name
        typer.echo(f"{name:<40}{cell(row.open):<24}{cell(row.whole):<24}{row.cla.value:>6.2f}{beside:>14}{p:>8}")
    for match in study.rankings:
        if match.comparable:
            tops = "; ".join(f"top {o.k}: {o.shared} shared (p {o.p:.2g})" for o in match.overlaps)
            typer.echo(f"published {match.kind}: rank correlation {match.correlation:.2f} (p {match.correlation_p:.2g}); {tops}")
        else:
            typer.echo(f"published {match.kind}: not compared, {match.reason}")
    for change in study.tuning.changes if study.tuning is not None else ():
        e = change.change
        typer.echo(
            f"after LoRA, {change.name}: {change.before.value:.3f} -> {change.after.value:.3f} ({e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}])"
        )


def cell(e: Any) -> str:
    """A number with its interval."""
    return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"
