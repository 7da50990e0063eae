"""Toy training: recipes say what they do, killed runs go on to the same bits, measures are what they claim, stages hand their weights on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

from mechicl.cli import app
from mechicl.data.gaussian import UnimodalTask, layout
from mechicl.errors import CheckpointError, DeviceError, NotFiniteError, OptionError, OutputPathError
from mechicl.training.toys import train as toy
from mechicl.training.toys.build import build, encoder_batch, part_of, train_encoder
from mechicl.training.toys.feed import Feed
from mechicl.training.toys.measure import attention_measures, measure, probes
from mechicl.training.toys.recipe import PRESETS, ToyRecipe, from_words, measuring_steps, parse_stop, recipe, set_fields, together_key
from mechicl.training.toys.train import load_toy, met, series, train_toy

TINY: dict[str, Any] = {"K": 32, "L": 4, "D": 8, "N": 4, "B": 2, "batch": 8, "steps": 60, "points": 5, "probe_n": 16, "n_novel": 16}
TWO: dict[str, Any] = {
    "K1": 32,
    "K2": 8,
    "L": 4,
    "D1": 8,
    "D2": 6,
    "N": 4,
    "B": 2,
    "n_novel": 16,
    "batch": 8,
    "steps": 12,
    "points": 3,
    "probe_n": 16,
}


def tiny(**changes: Any) -> ToyRecipe:
    """Seconds: it learns nothing."""
    return recipe("cpu", **{**TINY, **changes})


LONG = tiny(steps=90)


# -- recipes --------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_recipe_survives_json(name: str) -> None:
    made = recipe(name, seed=3, stop="accuracy_ic>=0.9")
    again = ToyRecipe.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made
    assert again.task.seed == 3
    build(replace(made, start=None))  # the sizes fit together


def test_the_papers_recipe_has_the_papers_numbers() -> None:
    made = recipe("huang2026")
    assert (made.optimizer, made.lr, made.weight_decay, made.batch, made.steps) == ("sgd", 1e-3, 1e-6, 128, 300_000)
    task = made.task
    assert isinstance(task, UnimodalTask)
    assert (task.K, task.L, task.N, task.D, task.B, task.eps, task.alpha) == (8192, 32, 8, 64, 2, 0.1, 0.0)
    n = sum(p.numel() for p in build(made).parameters())
    assert (
        n == 2 * (3 * 64 * 64 + 3 * (64 * 64 + 64) + 2 * 64) + 64 + 64 * 32
    )  # q, k, v; the MLP; two norms a layer; the last norm; the classifier


def test_short_names_find_their_owner() -> None:
    made = set_fields(recipe("cpu"), {"K": 1024, "positions": "alibi", "lr": 1e-4, "model.n_layers": 3, "seed": 5})
    assert (made.task.n_items, made.model["positions"], made.model["n_layers"], made.lr) == (1024, "alibi", 3, 1e-4)
    assert (made.seed, made.task.seed) == (5, 5)
    assert set_fields(made, {"task.seed": 9}).seed == 5
    assert set_fields(recipe("cpu_multimodal"), {"encoder": "mlp", "encoder.d_feat": 5, "stage": 3}).encoder == {"kind": "mlp", "d_feat": 5}
    assert from_words("cpu", ["K=2048", "positions=none", "lr=3e-4", "stop=none"], seed=2) == recipe(
        "cpu", K=2048, positions="none", lr=3e-4, seed=2
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"postions": "rope"}, "positions"),
        ({"K": 1000}, "L must divide K"),
        ({"stop": "accuracy"}, "stop must be"),
        ({"optimizer": "lion"}, "optimizer must be one of"),
        ({"freeze": "head"}, "freeze must be"),
        ({"steps": -1}, "steps must be"),
        ({"lr": float("nan")}, "lr must be"),
        ({"stage": 2}, "stage must be"),
        ({"start": "x", "early_fusion": True}, "start must be"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        recipe("cpu", **changes)
    with pytest.raises(OptionError, match="preset must be one of"):
        recipe("cpus")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300_000), st.integers(2, 80))
def test_measuring_steps_go_from_none_to_all(steps: int, points: int) -> None:
    found = measuring_steps(tiny(steps=steps, points=points))
    assert found[0] == 0
    assert found[-1] == steps
    assert list(found) == sorted(set(found))
    assert len(found) <= points + 1


def test_a_stopping_criterion_reads_its_measure() -> None:
    assert parse_stop(" accuracy_ic >= .95") == ("accuracy_ic", ">=", 0.95)
    assert met("loss<1e-1", {"loss": 0.05})
    assert not met("ih_1.0>0.5", {"ih_1.0": 0.5})
    assert not met("loss<1", {"loss": float("nan")})
    with pytest.raises(OptionError, match="stop must name a measure"):
        met("accuracy_xx>0.5", {"step": 1, "loss": 0.0})
    run = train_toy(tiny(stop="loss<10"), progress=False)
    assert run.table["step"].tolist() == [0]


def test_what_may_be_trained_together_is_told() -> None:
    one = tiny()
    for same in ({"seed": 4}, {"lr": 1e-4}, {"K": 64}, {"eps": 0.5}, {"stop": "loss<1"}):
        assert together_key(set_fields(one, same)) == together_key(one), same
    for other in ({"D": 16}, {"L": 8}, {"positions": "alibi"}, {"steps": 61}, {"batch": 9}, {"optimizer": "sgd"}, {"p_C": 0.5}):
        assert together_key(set_fields(one, other)) != together_key(one), other


# -- batches --------------------------------------------------------------------------------------------------------------------------------------


def test_a_batch_is_decided_by_recipe_and_step_alone() -> None:
    one, other = tiny(), tiny(seed=1)
    cfg = build(one).cfg
    straight, jump, pair = Feed([one], cfg), Feed([one], cfg), Feed([one, other], cfg)
    for step in range(20):
        last = straight([step])
    assert torch.equal(jump([19]).tokens, last.tokens)
    both = pair([19, 3])  # models may stand at different steps
    assert torch.equal(both.tokens[0], last.tokens[0])
    assert torch.equal(both.tokens[1], Feed([other], cfg)([3]).tokens[0])
    pair.keep([1])
    assert torch.equal(pair([4]).target[0], Feed([other], cfg)([4]).target[0])
    assert not torch.equal(straight([20]).tokens, last.tokens)


# -- measures -------------------------------------------------------------------------------------------------------------------------------------


def hand_made(task: UnimodalTask, right: torch.Tensor) -> torch.Tensor:
    """Two heads [batch, 2, dest, src]: head 0 looks one back; head 1 spreads over the right labels from the query, and looks at itself elsewhere."""
    at = layout(task)
    pattern = torch.zeros(len(right), 2, at.n_pos, at.n_pos)
    pattern[:, 0] = torch.eye(at.n_pos).roll(-1, 1)
    pattern[:, 0, 0] = 0
    pattern[:, 0, 0, 0] = 1
    pattern[:, 0, -1] = 0
    pattern[:, 0, -1, -2] = 1
    for t in range(1, at.n_pos):
        pattern[:, 0, t] = 0
        pattern[:, 0, t, t - 1] = 1
    pattern[:, 1] = torch.eye(at.n_pos)
    pattern[:, 1, -1] = 0
    for b in range(len(right)):
        pattern[b, 1, -1, torch.tensor(at.label)[right[b]]] = 1 / right[b].sum().float()
    return pattern


def test_measures_of_hand_made_patterns() -> None:
    task = UnimodalTask(K=32, L=4, N=4, D=8, B=2)
    right = torch.tensor([[True, False, True, False], [False, True, True, False]])
    found = attention_measures(hand_made(task, right), layout(task), right)
    assert found["ph1"].tolist() == [1.0, 0.0]
    assert found["ila"].tolist() == [1.0, 0.0]
    assert found["tila"].tolist() == [0.0, 0.5]  # two right labels share the attention
    assert found["tla"].tolist() == [1.0 * 1, 1.0]  # head 0 looks from the query to the last label
    assert found["ih"][1].item() == pytest.approx(0.5)
    assert found["ih"][0].item() == pytest.approx(-0.5)  # that label is a wrong one in both
    assert found["tiia"].tolist() == [0.0, 0.0]


def test_sequences_without_a_wrong_label_are_left_out_of_the_contrast() -> None:
    task = UnimodalTask(K=32, L=4, N=4, D=8, B=2)
    right = torch.tensor([[True, False, True, False], [True, True, True, True]])
    found = attention_measures(hand_made(task, right), layout(task), right)
    assert found["ih"][1].item() == pytest.approx(0.5)
    assert found["tila"][1].item() == pytest.approx((0.5 + 0.25) / 2)
    nowhere = attention_measures(hand_made(task, right)[1:], layout(task), right[1:])
    assert bool(nowhere["ih"].isnan().all())


def test_measures_agree_with_a_loop_over_the_pattern() -> None:
    made = tiny(n_heads=2, d_head=4, output_projection=True, probe_n=12)
    model = build(made)
    sets = probes(made, model.cfg)
    found = measure(model, sets, chunk=5)  # chunks of unequal size must not matter
    drawn = sets["ic"].draw
    _, cache = model.run_with_cache({"inputs_embeds": drawn.tokens})
    for layer in range(2):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"].double()
        for head in range(2):
            tila, tla, ih, ph, ila = [], [], [], [], []
            for b in range(12):
                a = pattern[b, head]
                labels = [2 * i + 1 for i in range(4)]
                good = [p for p, r in zip(labels, drawn.right[b].tolist(), strict=True) if r]
                bad = [p for p in labels if p not in good]
                tila.append(np.mean([float(a[-1, p]) for p in good]))
                tla.append(sum(float(a[-1, p]) for p in labels))
                if bad:
                    ih.append(tila[-1] - np.mean([float(a[-1, p]) for p in bad]))
                ph.append(np.mean([float(a[t, t - 1]) for t in range(1, 9)]))
                ila.append(np.mean([float(a[p, p - 1]) for p in labels[1:]]))
            for name, wanted in (("tila", tila), ("tla", tla), ("ih", ih), ("ph1", ph), ("ila", ila)):
                assert found[f"{name}_{layer}.{head}"] == pytest.approx(np.mean(wanted), abs=1e-6), name  # float32 attention


def test_accuracies_and_copied_labels_are_counted() -> None:
    made = tiny(probe_n=40)
    model = build(made)
    sets = probes(made, model.cfg)
    drawn = sets["ic"].draw
    with torch.no_grad():
        guess = model({"inputs_embeds": drawn.tokens})[:, 0].argmax(-1)  # the slow path, not the one that is measured with
    found = measure(model, sets)
    assert found["accuracy_ic"] == pytest.approx(np.mean([int(g) == int(t) for g, t in zip(guess, drawn.target, strict=True)]))
    assert found["cla_ic"] == pytest.approx(np.mean([int(g) in row.tolist() for g, row in zip(guess, drawn.label, strict=True)]))


# -- training -------------------------------------------------------------------------------------------------------------------------------------


def test_it_learns_from_the_examples_and_the_untrained_does_not() -> None:
    made = recipe("cpu", **{**TINY, "K": 1024, "n_novel": 64, "D": 16, "eps": 0.0, "steps": 1500, "batch": 32, "probe_n": 256, "n_places": 16, "positions": "one_hot",
                            "lr": 3e-3, "points": 20, "stop": "accuracy_ic>=0.85"})  # fmt: skip
    run = train_toy(made, progress=False, threads=1)
    assert run.table["accuracy_ic"].iloc[0] < 0.5  # of 4 labels; copying any label of the context gives 0.63
    assert run.table["accuracy_ic"].iloc[-1] >= 0.85
    got = series(run)
    assert got.n == 256
    assert set(got.values) == {str(c) for c in run.table.columns} - {"step", "loss"}


def test_same_recipe_same_bits_and_another_seed_is_another_run() -> None:
    one, again, other = (train_toy(r, progress=False, threads=1) for r in (tiny(), tiny(), tiny(seed=1)))
    pd.testing.assert_frame_equal(one.table, again.table, check_exact=True)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), again.model.parameters(), strict=True))
    assert not torch.equal(one.model.W_U, other.model.W_U)


def test_a_diverging_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match="smaller lr"):
        train_toy(tiny(lr=1e30, optimizer="sgd"), tmp_path / "run", progress=False)
    with pytest.raises(NotFiniteError, match="smaller lr"):  # and says it again when asked to go on
        train_toy(tiny(lr=1e30, optimizer="sgd"), tmp_path / "run", progress=False, resume=True)


NURSERY = """
import json, os, resource, signal, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from mechicl.errors import OutputPathError
from mechicl.training import runs
from mechicl.training.toys import train as toy
from mechicl.training.toys.recipe import ToyRecipe

def train(job):
    toy.SAVE_SECONDS = 0.02
    if job.get("kill"):
        left, write = [job["kill"]], runs.os.fsync
        def fsync(handle):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            write(handle)
        runs.os.fsync = fsync
    if job.get("limit"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], resource.RLIM_INFINITY))
    try:
        toy.train_toy(ToyRecipe.from_json(job["recipe"]), job["out"], resume=True, progress=False, threads=1)
    except OutputPathError as error:
        os._exit(3 if "make room and resume" in str(error) else 4)
    os._exit(0)

for line in sys.stdin:  # nothing is trained here, so that children may be forked instead of started, which takes seconds
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        train(job)
    if job.get("after") is not None:
        while not (Path(job["out"]) / "state.safetensors").exists():
            time.sleep(0.002)
        time.sleep(job["after"])
        os.kill(pid, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def nursery() -> Iterator[Callable[..., int]]:
    """Trains in a process of its own: killed at its n-th write (`kill`) or some seconds after its first checkpoint (`after`), or with a limit on
    the size of files. Returns the exit code; 3 is a refusal to write."""
    process = subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def train(out: Path, made: ToyRecipe, **how: Any) -> int:
        print(json.dumps({"out": str(out), "recipe": made.to_json(), **how}), file=process.stdin, flush=True)
        return int(process.stdout.readline())  # type: ignore[union-attr]

    yield train
    process.stdin.close()
    process.stdout.close()
    process.wait(timeout=60)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_toy(LONG, folder, progress=False, threads=1)
    return folder


def same(one: Path, other: Path) -> None:
    for name in sorted(p.relative_to(one) for p in one.rglob("*.safetensors")):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), name
    pd.testing.assert_frame_equal(pd.read_parquet(one / "metrics.parquet"), pd.read_parquet(other / "metrics.parquet"), check_exact=True)
    assert not list(other.rglob("*.part"))


@pytest.mark.parametrize("kill", [1, 2, 4, 7, 12])
def test_killed_within_a_write_it_resumes_to_the_same_bits(kill: int, whole: Path, tmp_path: Path, nursery: Callable[..., int]) -> None:
    assert nursery(tmp_path / "run", LONG, kill=kill) == -signal.SIGKILL
    train_toy(LONG, tmp_path / "run", resume=True, progress=False, threads=1)
    same(whole, tmp_path / "run")


def test_killed_at_random_moments_again_and_again(whole: Path, tmp_path: Path, nursery: Callable[..., int]) -> None:
    moments = [0.0, *np.random.default_rng().uniform(0.0, 0.15, 3)]  # the first surely in time; another three every time the test runs
    codes = [nursery(tmp_path / "run", LONG, after=moment) for moment in moments]
    assert -signal.SIGKILL in codes, (moments, codes)
    train_toy(LONG, tmp_path / "run", resume=True, progress=False, threads=1)
    same(whole, tmp_path / "run")


def test_checkpoints_between_the_measured_steps_do_not_change_the_run(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "SAVE_SECONDS", 0.0)
    train_toy(LONG, tmp_path / "run", progress=False, threads=1)
    same(whole, tmp_path / "run")


def test_a_finished_run_is_read_not_trained(whole: Path) -> None:
    before = (whole / "state.safetensors").stat().st_mtime_ns
    run = train_toy(LONG, whole, resume=True, progress=False)
    assert (whole / "state.safetensors").stat().st_mtime_ns == before
    pd.testing.assert_frame_equal(run.table, pd.read_parquet(whole / "metrics.parquet"), check_exact=True)
    early = load_toy(whole, step=0)
    assert torch.equal(early.W_U, build(LONG).W_U)
    assert torch.equal(load_toy(whole).W_U, run.model.W_U)
    with pytest.raises(OptionError, match="step must be one of 0, "):
        load_toy(whole, step=7)


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    (to / "steps").mkdir()
    for path in folder.rglob("*.*"):
        (to / path.relative_to(folder)).write_bytes(path.read_bytes())
    return to


def test_another_recipe_a_used_folder_and_damage_are_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputPathError, match="resume=True"):
        train_toy(LONG, whole, progress=False)
    with pytest.raises(CheckpointError, match=r"recipe.task.K must be what the run in .* 32; got 64"):
        train_toy(set_fields(LONG, {"K": 64}), whole, resume=True, progress=False)
    for name in ("state.safetensors", "metrics.parquet", "config.json"):
        broken = copy(whole, tmp_path / name)
        data = (broken / name).read_bytes()
        (broken / name).write_bytes(data[: len(data) // 2])
        before = {p: p.read_bytes() for p in broken.rglob("*.*")}
        with pytest.raises(CheckpointError, match="start again"):
            train_toy(LONG, broken, resume=True, progress=False)
        assert {p: p.read_bytes() for p in broken.rglob("*.*")} == before
    with pytest.raises(CheckpointError, match="folder must be a toy run's"):
        load_toy(tmp_path)


def test_where_nothing_can_be_written_any_more_what_there_is_stays(whole: Path, tmp_path: Path, nursery: Callable[..., int]) -> None:
    out = tmp_path / "run"
    limit = (whole / "state.safetensors").stat().st_size - 1  # the first checkpoint fits; the later ones hold moments too
    assert nursery(out, LONG, limit=limit) == 3
    assert not list(out.rglob("*.part"))
    assert load_toy(out).cfg.n_layers == 2  # the first checkpoint is still whole
    train_toy(LONG, out, resume=True, progress=False, threads=1)
    same(whole, out)


# -- stages ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages") / "one"
    train_toy(tiny(steps=12, points=3), folder, progress=False, threads=1)
    return folder


def test_stage_two_starts_from_stage_one_and_freezes_what_it_is_told(stage_one: Path, tmp_path: Path) -> None:
    made = recipe("cpu_multimodal", **TWO, start=str(stage_one), freeze="decoder")
    first = load_toy(stage_one).state_dict()
    run = train_toy(made, tmp_path / "two", progress=False, threads=1)
    last = run.model.state_dict()
    assert all(torch.equal(first[name], last[name]) for name in first)
    fresh = build(made).state_dict()
    learnt = [name for name in last if part_of(name) == "projector" and not torch.equal(fresh[name], last[name])]
    assert learnt
    free = train_toy(replace(made, freeze=()), progress=False, threads=1).model.state_dict()
    assert not torch.equal(free["W_U"], first["W_U"])
    assert {"ph2_0.0", "tiia1_1.0", "tiia2_1.0", "ila2_0.0"} <= set(run.table.columns)
    again = train_toy(made, tmp_path / "two", resume=True, progress=False)
    assert torch.equal(again.model.W_U, run.model.W_U)


def test_stage_three_trains_the_encoder_first(stage_one: Path) -> None:
    made = replace(
        recipe("cpu_multimodal", **TWO, start=str(stage_one), eps2=0.1),
        stage=3,
        encoder={"kind": "mlp", "d_feat": 16},
        encoder_steps=500,
        batch=64,
    )
    model = build(made)
    decoder = model.W_U.detach().clone()
    values, classes = encoder_batch(made, 10_000, model.device)
    before = float((model.encoder.classify(values).argmax(-1) == classes).float().mean())  # type: ignore[union-attr, operator]
    train_encoder(model, made)
    after = float((model.encoder.classify(values).argmax(-1) == classes).float().mean())  # type: ignore[union-attr, operator]
    assert before < 0.5 < 0.8 < after  # 8 classes
    assert torch.equal(model.W_U, decoder)
    frozen = train_toy(replace(made, freeze=("encoder",)), progress=False, threads=1).model.state_dict()
    assert all(torch.equal(frozen[name], value) for name, value in model.state_dict().items() if name.startswith("encoder."))
    run = train_toy(made, progress=False, threads=1).model.state_dict()
    assert any(not torch.equal(run[name], frozen[name]) for name in run if name.startswith("encoder.body"))


def test_a_start_that_does_not_fit_is_refused(stage_one: Path, tmp_path: Path) -> None:
    made = recipe("cpu_multimodal", **TWO, start=str(stage_one))
    with pytest.raises(CheckpointError, match="same decoder"):
        build(set_fields(made, {"n_layers": 3}))
    with pytest.raises(CheckpointError, match="folder must be a toy run's"):
        build(set_fields(made, {"start": str(tmp_path)}))
    with pytest.raises(DeviceError, match="device must"):
        train_toy(tiny(), device="nowhere", progress=False)
    with pytest.raises(OptionError, match="freeze must leave something"):
        build(set_fields(made, {"freeze": ("decoder", "projector")}))


# -- command line ---------------------------------------------------------------------------------------------------------------------------------


def test_the_command_trains_resumes_and_refuses(tmp_path: Path) -> None:
    words = [x for name, value in TINY.items() for x in ("--set", f"{name}={value}")]
    command = ["train", "toy", *words, "--out", str(tmp_path / "run"), "--quiet", "--threads", "1"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert "accuracy_ic" in first.stdout
    again = CliRunner().invoke(app, [*command, "--resume"])
    assert again.stdout == first.stdout
    for extra, message in ((["--set", "Kk=3"], "Did you mean"), (["--set", "K"], "NAME=VALUE"), ([], "resume")):
        refused = CliRunner().invoke(app, [*command, *extra])
        assert refused.exit_code == 2
        assert message in refused.stderr
    dry = CliRunner().invoke(app, ["train", "toy", "--preset", "huang2026", "--dry-run"])
    assert json.loads(dry.stdout)["steps"] == 300_000
