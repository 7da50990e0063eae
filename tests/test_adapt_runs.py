"""Runs of fine-tunings: what is written, and that a killed run ends as if it had not been killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mechicl
from mechicl.analysis.trainings.bands import seed_bands
from mechicl.cli import app
from mechicl.data import concepts
from mechicl.data.link_context import generated_pool, link_episodes
from mechicl.errors import CheckpointError, OptionError, OutputPathError
from mechicl.prompts.episode import Episode
from mechicl.training.adapting.adapt import AdaptRun, adapt
from mechicl.training.adapting.loop import Loop
from mechicl.training.adapting.measure import Probe, head_curve, measure, when
from mechicl.training.runs import read_tensors

SOME: dict[str, Any] = {"steps": 4, "batch": 2, "rank": 2, "checkpoint_every": 2, "threads": 1, "device": "cpu", "progress": False}


def draw(n: int, seed: int) -> list[Episode]:
    """Training episodes."""
    return concepts.draw(n, classes=2, shots=1, size=28, seed=seed, split="train")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> AdaptRun:
    """A small run with measures, LoRA with dropout."""
    return adapt("demo", tmp_path_factory.mktemp("adapt") / "run", **whole_run())


def whole_run() -> dict[str, Any]:
    probe = concepts.draw(8, classes=2, shots=1, size=28, seed=9)
    return {
        **SOME,
        "data": draw,
        "steps": 6,
        "dropout": 0.2,
        "probe": Probe(probe, knocked=1, n_random=1),
        "measure_at": [3],
        "general": draw_other,
        "mix": 0.5,
    }


def draw_other(n: int, seed: int) -> list[Episode]:
    """Another task."""
    return concepts.draw(n, classes=2, shots=1, size=56, seed=seed, split="train")


def same(one: Path, other: Path) -> None:
    a, b = read_tensors(one / "adapter/adapter_model.safetensors")[0], read_tensors(other / "adapter/adapter_model.safetensors")[0]
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    assert (one / "growth.json").read_text() == (other / "growth.json").read_text()


def test_a_run_says_what_it_did_without_pickle(finished: AdaptRun) -> None:
    assert finished.table["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert finished.growth is not None
    assert finished.growth.steps.tolist() == [0, 3, 6]
    assert {"accuracy", "induction, best head", "previous token, best head", "accuracy without random heads"} <= set(finished.growth.values)
    assert {p.suffix for p in finished.folder.rglob("*") if p.is_file()} == {".json", ".jsonl", ".safetensors"}
    assert AdaptRun.open(finished.folder).result == finished.adapter


@pytest.mark.parametrize("stop", [2, 5])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    stop: int, finished: AdaptRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"n": 0}
    take_step = Loop.take_step

    def breaking(self: Loop) -> dict[str, float]:
        if self.step == stop and not calls["n"]:
            calls["n"] = 1
            raise KeyboardInterrupt
        return take_step(self)

    monkeypatch.setattr(Loop, "take_step", breaking)
    with pytest.raises(KeyboardInterrupt):
        adapt("demo", tmp_path / "run", **whole_run())
    with pytest.raises(OptionError, match="finished"):
        AdaptRun.open(tmp_path / "run")
    with pytest.raises(OutputPathError, match="resume=True"):
        adapt("demo", tmp_path / "run", **whole_run())
    adapt("demo", tmp_path / "run", resume=True, **whole_run())
    same(finished.folder, tmp_path / "run")


def test_a_killed_run_ends_as_if_it_had_not_been(finished: AdaptRun, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport warnings; warnings.simplefilter('ignore')\n"
    code += "import test_adapt_runs as t\nfrom mechicl.training.adapting.adapt import adapt\n"
    code += f"adapt('demo', {str(tmp_path / 'run')!r}, **t.whole_run())\n"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    while time.monotonic() < until and not (metrics.exists() and '"step": 3' in metrics.read_text()):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert metrics.exists()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["data"], config["general"] = (f"{draw.__module__}.{name}" for name in ("draw", "draw_other"))  # with or without "tests."
    (tmp_path / "run" / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    adapt("demo", tmp_path / "run", resume=True, **whole_run())
    same(finished.folder, tmp_path / "run")


def test_a_changed_configuration_is_refused_by_name(finished: AdaptRun) -> None:
    for change, name in (
        ({"lr": 1.0}, "course.lr"),
        ({"seed": 1}, "course.seed"),
        ({"rank": 3}, "parts"),
        ({"data": draw_other}, "data"),
        ({"mix": 0.25}, "mix"),
    ):
        with pytest.raises(CheckpointError, match=name):
            adapt("demo", finished.folder, **(whole_run() | change | {"resume": True}))
    other = mechicl.load("demo")
    with torch.no_grad():
        other.hf.get_output_embeddings().weight.mul_(1.01)
    with pytest.raises(CheckpointError, match="weights must be"):
        adapt(other, finished.folder, **whole_run(), resume=True)


def test_the_whole_decoder_is_resumed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**SOME, "data": draw, "lora": False, "lr": 1e-3}
    one = adapt("demo", tmp_path / "a", **options)
    take_step = Loop.take_step
    monkeypatch.setattr(Loop, "take_step", lambda self: take_step(self) if self.step < 3 else (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        adapt("demo", tmp_path / "b", **options)
    monkeypatch.setattr(Loop, "take_step", take_step)
    other = adapt("demo", tmp_path / "b", resume=True, **options)
    assert one.model is not None
    assert other.model is not None
    assert (one.model / "model.safetensors").read_bytes() == (other.model / "model.safetensors").read_bytes()


def test_bfloat16_arithmetic_keeps_float32_weights(tmp_path: Path) -> None:
    run = adapt("demo", tmp_path / "run", data=draw, bf16=True, **SOME)
    plain = adapt("demo", tmp_path / "plain", data=draw, **SOME)
    assert run.adapter is not None
    assert {t.dtype for t in read_tensors(run.adapter / "adapter_model.safetensors")[0].values()} == {torch.float32}
    assert not torch.equal(*(torch.tensor(r.table["loss"].tolist()) for r in (run, plain)))
    assert run.table["loss"].iloc[0] == pytest.approx(plain.table["loss"].iloc[0], rel=0.3, abs=0.02)  # eight bits of mantissa


# --- measures ------------------------------------------------------------------------------------------------------------


def test_a_probe_reads_the_bundled_models_heads() -> None:
    """The bundled model learns from examples, so its induction heads are there and its answers need them; random weights have none."""
    from mechicl.models.vlm import HookedVLM
    from mechicl.training.organisms import build

    probe = Probe(concepts.draw(24, classes=2, shots=2, size=28, seed=5), circuit={"nothing much": [(3, 3)]}, n_random=2)
    trained = measure(mechicl.load("demo"), probe)
    fresh = measure(HookedVLM(*build("qwen2_5_vl", preset="demo"), check=False), probe)
    assert trained.measures["accuracy"].value > 0.8
    assert trained.measures["induction, best head"].value > 0.8
    assert fresh.measures["induction, best head"].value < 0.2
    assert fresh.measures["accuracy"].low < 0.5
    assert trained.heads["induction"].shape == (4, 4)
    assert {"accuracy without nothing much", "accuracy without the best induction heads"} <= set(trained.measures)


def test_heads_can_be_followed_and_seeds_make_a_band(finished: AdaptRun, tmp_path: Path) -> None:
    steps, values = head_curve(finished.folder, "induction", (2, 1))
    assert steps.tolist() == [0, 3, 6]
    assert np.isfinite(values).all()
    other = adapt("demo", tmp_path / "run", **(whole_run() | {"seed": 1}))
    bands = seed_bands([finished.growth, other.growth], ["induction, best head", "previous token, best head"])
    assert bands.steps.tolist() == [0, 3, 6]
    assert bands.n_runs.tolist() == [2, 2, 2]
    with pytest.raises(OptionError, match="score must be"):
        head_curve(finished.folder, "copying", (0, 0))
    with pytest.raises(OptionError, match="head must be"):
        head_curve(finished.folder, "induction", (9, 0))


def test_what_was_measured_at_the_end_is_what_the_loaded_model_gives(tmp_path: Path) -> None:
    """Heads switched off included: adapters that a hook does not reach would show here."""
    probe = Probe(concepts.draw(8, classes=2, shots=2, size=28, seed=5), knocked=4, n_random=2)
    for lora in (True, False):
        run = adapt("demo", tmp_path / str(lora), data=draw, probe=probe, measure_at=[], lora=lora, lr=1e-2, **SOME)
        again = measure(mechicl.load(run.result), probe)
        assert run.growth is not None
        for name, found in again.measures.items():
            assert run.growth.values[name][-1] == pytest.approx(found.value, abs=1e-5), name
        assert run.growth.values["induction, best head"][0] != pytest.approx(run.growth.values["induction, best head"][-1], abs=1e-4)


def test_measured_steps_are_spread_on_a_logarithm() -> None:
    assert when(4, 100) == (0, 1, 10, 100)
    assert when([5], 100) == (0, 5, 100)


# --- the command ---------------------------------------------------------------------------------------------------------


def test_the_command_adapts_the_bundled_model_end_to_end(tmp_path: Path) -> None:
    words = "adapt demo --strategy mix --shots 2 --size 28 --groups 3 --steps 2 --batch 2 --rank 2 --probe 4 --probe-shots 1 --measure 2 --short -q"
    command = [*words.split(), "--threads", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "induction, best head" in result.output
    assert result.output.strip().endswith("adapter")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["negatives"] == "neighbours"
    assert config["mix"] == 0.5
    assert config["general"] == {"task": "concepts", "size": 28}
    assert mechicl.load(tmp_path / "run" / "adapter").cfg.n_layers == 4
    again = CliRunner().invoke(app, [*command, "--resume"])
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--negatives soft", "negatives must be"),
        ("--general chess", "general must be"),
        ("--strategy 9-way", "strategy must be"),
        ("--shots 40", "pictures"),
    ],
)
def test_the_command_refuses_in_one_line(words: str, message: str, tmp_path: Path) -> None:
    command = ["adapt", "demo", "--out", str(tmp_path / "run"), "--groups", "3", "--size", "28", "--probe", "0", "-q"]
    if "negatives" not in words:
        command += ["--negatives", "random"]
    result = CliRunner().invoke(app, [*command, *words.split()])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strategy", ["2-way", "2-way-random", "2-way-weight", "policy_2way_weight"])
def test_every_strategy_trains(strategy: str, tmp_path: Path) -> None:
    pool = generated_pool(0, 3, per_class=4, size=28, split="train")
    run = adapt("demo", tmp_path / "run", pool=pool, strategy=strategy, shots=3, **(SOME | {"steps": 1}))
    assert np.isfinite(run.table["loss"]).all()
    config = json.loads((run.folder / "config.json").read_text())
    assert config["data"]["strategy"] == strategy
    assert config["data"]["negatives"] == "random"


def test_the_bundled_model_gets_better_at_the_links_it_is_trained_on(tmp_path: Path) -> None:
    """Six fixed episodes whose answers it does not give before; their likelihood must rise."""
    pool = generated_pool(0, 3, per_class=4, size=28, split="train")
    few = link_episodes(pool, 6, shots=2, seed=3)
    run = adapt("demo", tmp_path / "run", data=few, **(SOME | {"steps": 25, "batch": 6, "lr": 5e-3, "rank": 8}))
    loss = run.table["loss"]
    assert loss.iloc[-1] < 0.5 * loss.iloc[0]


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport warnings; warnings.simplefilter('ignore')\n"
    code += "import test_adapt_runs as t\nfrom mechicl.training.adapting.adapt import adapt\n"
    code += f"adapt('demo', {str(tmp_path / 'two')!r}, data=t.draw, **t.SOME)\n"
    script = tmp_path / "script.py"
    script.write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29533", str(script)]
    subprocess.run(launcher, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    two, one = AdaptRun.open(tmp_path / "two"), adapt("demo", tmp_path / "one", data=draw, **(SOME | {"batch": 4}))
    assert two.table["loss"].tolist() == pytest.approx(one.table["loss"].tolist(), rel=1e-3)  # padding changes float32 sums
    assert two.table["tokens"].tolist() == one.table["tokens"].tolist()
