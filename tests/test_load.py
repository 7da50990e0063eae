"""Loading and its refusals: each bad input gets one clear error, before any long work."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, ViTConfig

import mechicl
from mechicl.errors import (
    CheckpointError,
    DeviceError,
    HeadIndexError,
    HookNameError,
    HookNotFiredError,
    MissingInputError,
    OptionError,
    ParityError,
    UnsupportedModelError,
)
from mechicl.models.doctor import diagnose
from mechicl.models.hooked import HookedModel, check_heads
from mechicl.models.load import load
from mechicl.models.probe import picture_probe, text_probe
from mechicl.models.vlm import HookedVLM
from mechicl.training.organisms import build, save


@pytest.fixture(scope="module")
def parts() -> tuple:
    return build("qwen2_5_vl", preset="tiny")


@pytest.fixture(scope="module")
def model(parts: tuple) -> HookedVLM:
    return HookedVLM(*parts)


@pytest.fixture(scope="module")
def folder(parts: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(*parts, tmp_path_factory.mktemp("checkpoint"))


def test_a_folder_loads_into_the_same_model(folder: Path, model: HookedVLM) -> None:
    loaded = load(folder)
    inputs = picture_probe(loaded.processor)
    with torch.no_grad():
        assert torch.allclose(loaded(inputs), model(inputs), atol=1e-5)  # weights lie elsewhere in memory
    assert isinstance(loaded, HookedModel)
    assert loaded.describe()["dtype"] == "float32"
    assert str(folder) in repr(loaded)


def test_dtype_is_followed(folder: Path) -> None:
    loaded = load(folder, dtype="bfloat16")
    assert loaded.cfg.dtype == torch.bfloat16
    _, cache = loaded.run_with_cache(picture_probe(loaded.processor), names_filter="blocks.0.attn.hook_pattern")
    assert cache["pattern", 0].dtype == torch.bfloat16


def test_a_device_map_and_an_implementation_are_passed_on(folder: Path, model: HookedVLM) -> None:
    loaded = load(folder, device_map="cpu", attn_implementation="eager")
    assert loaded.describe()["attention"] == "eager"
    inputs = picture_probe(loaded.processor)
    with torch.no_grad():
        assert torch.allclose(loaded(inputs), model(inputs), atol=1e-4)  # eager against sdpa
        assert torch.allclose(loaded.attention_rows(inputs)[2], model.attention_rows(inputs)[2], atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"device": "cuda:97"}, DeviceError, "exist on this machine"),
        ({"device": "quantum"}, DeviceError, "cpu"),
        ({"dtype": "float12"}, OptionError, "bfloat16"),
        ({"device": "cpu", "device_map": "auto"}, OptionError, "not both"),
    ],
)
def test_impossible_options_are_refused_first(folder: Path, kwargs: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        load(folder, **kwargs)


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match="readable JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickled"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="can be read"):
        load("nobody/nothing-of-that-name")


def test_a_model_that_writes_no_text_is_refused_by_name(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="vit"):
        load(tmp_path)


def test_a_refused_family_is_named_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "git"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=r"git.*inline"):
        load(tmp_path)


def test_something_that_is_no_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear"):
        HookedVLM(torch.nn.Linear(2, 2))


def test_a_model_that_moves_under_its_hooks_fails_the_load_time_check(parts: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    from mechicl.models import check

    right = check.softmax
    monkeypatch.setattr(check, "softmax", lambda *args: right(*args).roll(1, -1))
    with pytest.raises(ParityError, match="differ by"):
        HookedVLM(*parts)
    HookedVLM(*parts, check=False)


def test_hook_names_are_checked_and_must_fire(model: HookedVLM) -> None:
    text = text_probe(model.hf)
    with pytest.raises(HookNameError, match="Did you mean"):
        model.run_with_cache(text, names_filter="blocks.0.attn.hook_patern")
    with pytest.raises(HookNameError, match=r"blocks\.9"):
        model.run_with_hooks(text, fwd_hooks=[("blocks.9.hook_resid_pre", lambda x, hook: x)])
    with pytest.raises(HookNotFiredError, match="hook_image_features"):
        model.run_with_hooks(text, fwd_hooks=[("hook_image_features", lambda x, hook: x)])
    with pytest.raises(HookNameError, match="filter"):
        model.run_with_hooks(text, fwd_hooks=[(lambda name: False, lambda x, hook: x)])
    _, cache = model.run_with_cache(text)  # everything that there is: no complaint about pictures
    assert "hook_image_features" not in cache
    with pytest.raises(UnsupportedModelError, match="only be read"):
        model.run_with_hooks(text, fwd_hooks=[("ln_final.hook_scale", lambda x, hook: x * 2)])


def test_inputs_must_be_whole(model: HookedVLM) -> None:
    inputs = picture_probe(model.processor)
    with pytest.raises(MissingInputError, match="input_ids"):
        model({"pixel_values": inputs["pixel_values"]})
    with pytest.raises(MissingInputError, match="pixel_values"):
        model({"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]})
    with pytest.raises(MissingInputError, match="Batch"):
        model.inputs(3)


def test_positions_select_logits_without_the_others(model: HookedVLM) -> None:
    inputs = picture_probe(model.processor, ("one", "one two three four"))
    seen = []
    handle = model.anatomy.unembed.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    with torch.no_grad():
        whole = model(inputs, positions="all")
        last = model(inputs)
        some = model(inputs, positions=torch.tensor([-1, -3]))
        each = model(inputs, positions=torch.tensor([[5], [6]]))
    handle.remove()
    assert seen == [whole.shape[1], 1, 2, 1]
    # a matrix product of other shape rounds otherwise
    assert torch.allclose(last[:, 0], whole[:, -1], atol=1e-5)
    assert torch.allclose(some, whole[:, [-1, -3]], atol=1e-5)
    assert torch.allclose(each[1, 0], whole[1, 6], atol=1e-5)
    for bad in ("first", [whole.shape[1]], []):
        with pytest.raises(OptionError, match="positions"):
            model(inputs, positions=bad)


def test_heads_and_layers_outside_the_model_are_refused(model: HookedVLM) -> None:
    assert check_heads(model, [(0, 3)]) == [(0, 3)]
    for bad in ((0, 4), (3, 0), (-1, 0)):
        with pytest.raises(HeadIndexError, match=r"0\.\.2 and head in 0\.\.3"):
            check_heads(model, [bad])
    with pytest.raises(OptionError, match="layers"):
        model.attention_rows(text_probe(model.hf), layers=[7])


def test_rendering_needs_a_processor(parts: tuple) -> None:
    with pytest.raises(OptionError, match="processor"):
        _ = HookedVLM(parts[0]).renderer


def test_the_doctor_finds_a_healthy_model_healthy_and_a_blind_one_blind(model: HookedVLM) -> None:
    assert all(check.ok for check in diagnose(model))
    hf, processor = build("qwen2_5_vl", preset="tiny")
    with torch.no_grad():
        for parameter in hf.model.visual.merger.parameters():
            parameter.zero_()
    blind = [check.name for check in diagnose(HookedVLM(hf, processor)) if not check.ok]
    assert blind == ["another picture moves the logits"]


def test_gradients_reach_hook_points_backwards(model: HookedVLM) -> None:
    inputs = picture_probe(model.processor)
    grads = {}

    def keep(grad: torch.Tensor, hook: object) -> None:
        grads["z"] = grad.clone()

    with model.hooks(bwd_hooks=[("blocks.1.attn.hook_z", keep)]):
        model(inputs)[0, -1, 7].backward()
    model.zero_grad()
    x = {}

    def save_z(z: torch.Tensor, hook: object) -> torch.Tensor:
        x["z"] = z.detach().requires_grad_()
        return x["z"]

    model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.attn.hook_z", save_z)])[0, -1, 7].backward()
    model.zero_grad()
    assert torch.allclose(grads["z"], x["z"].grad, atol=1e-6)
    assert grads["z"].abs().max() > 0


def test_the_public_names_are_there() -> None:
    assert "load" in dir(mechicl)
    assert mechicl.load is load
    with pytest.raises(AttributeError, match="nonsense"):
        _ = mechicl.nonsense
