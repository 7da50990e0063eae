"""Fine-tuning: the loss is on the answer alone, what is frozen stays, a killed run ends as if it had not been killed."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import mechicl
from mechicl.data import concepts
from mechicl.data.link_context import SENTENCES, link_prompt
from mechicl.errors import CheckpointError, DeviceError, EpisodeError, NotFiniteError, OptionError, OutputPathError
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.episode import Episode
from mechicl.prompts.render import Renderer
from mechicl.prompts.spans import QUERY
from mechicl.training.adapting.adapt import AdaptRun, adapt
from mechicl.training.adapting.data import IGNORED, Feed, answer_loss, closing, kept_positions, lesson
from mechicl.training.adapting.loop import Course, Loop, start
from mechicl.training.adapting.parts import choose, decoder_names, projector_names
from mechicl.training.organisms import build
from mechicl.training.organisms.every.processors import build_whole
from mechicl.training.runs import Run

TINY = ("qwen2_5_vl", "llava", "gemma3", "smolvlm")
SOME: dict[str, Any] = {"steps": 4, "batch": 2, "rank": 2, "checkpoint_every": 2, "threads": 1, "device": "cpu", "progress": False}


def draw(n: int, seed: int) -> list[Episode]:
    """Training episodes."""
    return concepts.draw(n, classes=2, shots=1, size=28, seed=seed, split="train")


def draw_other(n: int, seed: int) -> list[Episode]:
    """Another task."""
    return concepts.draw(n, classes=2, shots=1, size=56, seed=seed, split="train")


def tiny(family: str) -> HookedVLM:
    """A tiny model with random weights."""
    model, processor = build(family)
    return HookedVLM(model, processor, check=False)


def loop_of(family: str, folder: Path, *, feed: Feed | None = None, lora: bool = False, **options: Any) -> Loop:
    """A loop over a tiny model."""
    given = {"steps": 4, "lr": 1e-3, "batch": 2} | options
    course = Course(**given)
    model = tiny(family)
    choose(model.hf, lora=lora, projector=False, rank=2, alpha=4.0, dropout=0.0, base="", seed=0)
    feed = feed or Feed(draw, course.batch * course.accumulation)
    return Loop(model.hf, model.renderer, feed, course, Run.open(folder, {}, resume=False), start("cpu", projector=False))


# --- the loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*TINY, "qwen3_vl", "mllama", "paligemma"])
def test_only_the_answer_counts_and_its_loss_is_transformers_own(family: str, organism: Any) -> None:
    model, processor = organism(family)
    renderer = Renderer(processor, model.config)
    batch = renderer.render(concepts.draw(3, classes=2, shots=1, size=28, seed=1))
    close = closing(renderer, batch.episodes[0])
    one = lesson(batch, close=close)
    for row in range(batch.n):
        wanted = [int(t) for t in one.labels[row] if t != IGNORED]
        assert wanted == [*batch.candidate_ids[row][batch.answers[row]], *close]
        where = (one.labels[row] != IGNORED).nonzero()[:, 0].tolist()
        assert where[0] == int(batch.query_pos[row]) + 1  # right behind the prompt
        assert where == list(range(where[0], where[0] + len(wanted)))
    with torch.no_grad():
        out = model(**one.inputs, labels=one.labels, use_cache=False)
        few = model(**one.inputs, use_cache=False, logits_to_keep=kept_positions(one.labels)).logits
    mine = answer_loss(few, one.labels) / one.n_tokens
    assert float(mine) == pytest.approx(float(out.loss), abs=1e-5)  # float32, sums in another order


@pytest.mark.parametrize("family", ["hunyuan_vl", "mistral_large4", "minimax_m3_vl"])
def test_a_prompt_is_learnt_as_it_is_alone_where_a_familys_own_positions_or_padding_depend_on_the_batch(
    family: str, tmp_path: Path
) -> None:
    model, processor = build_whole(family)
    model.eval()
    renderer = Renderer(processor, model.config)
    longer = concepts.draw(1, classes=2, shots=2, size=28, seed=0, syllables=(2, 2))
    shorter = concepts.draw(1, classes=2, shots=1, size=28, seed=1, syllables=(2, 2))
    feed = Feed([*longer, *shorter], 2)
    loop = Loop(
        model,
        renderer,
        feed,
        Course(steps=1, lr=1e-3, batch=2),
        Run.open(tmp_path / "run", {}, resume=False),
        start("cpu", projector=False),
    )
    with torch.no_grad():
        together = sum(float(loop.loss(one)) for one in loop.lessons())
        alone = sum(float(loop.loss(lesson(renderer.render(few), close=loop.close))) for few in (longer, shorter))
        padded = lesson(renderer.render([*longer, *shorter]), close=loop.close)
        raw = model(**padded.inputs, use_cache=False, logits_to_keep=kept_positions(padded.labels)).logits
    assert together == pytest.approx(alone, abs=2e-3)
    assert abs(float(answer_loss(raw, padded.labels)) - alone) > 1e-2  # what the family does by itself with a padded batch
    assert len(loop.lessons()) == (2 if family == "minimax_m3_vl" else 1)


def test_the_token_that_ends_an_answer_is_the_templates_own_whatever_the_episode(organism: Any) -> None:
    model, processor = organism("qwen2_5_vl")
    renderer = Renderer(processor, model.config)
    episode = draw(1, 0)[0]
    for one in (episode, episode.without_shots(), link_prompt(episode, SENTENCES)):
        assert processor.tokenizer.convert_ids_to_tokens(list(closing(renderer, one))) == ["<|im_end|>"]
    model, processor = organism("paligemma")  # no turns, no control token behind a label
    assert closing(Renderer(processor, model.config), episode) == (processor.tokenizer.eos_token_id,)


def test_a_step_is_that_of_plain_torch_by_hand(tmp_path: Path) -> None:
    """The whole step again: gradient of the mean over answer tokens, norm clipped, AdamW, learning rate after warm-up."""
    loop = loop_of("qwen2_5_vl", tmp_path / "run", accumulation=2, clip=0.5, weight_decay=0.1)
    model, processor = build("qwen2_5_vl")
    decoder = decoder_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in decoder)
    renderer = Renderer(processor, model.config)
    batch = renderer.render(loop.feed.step(0))  # all four at once
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    long = batch.append([[*batch.candidate_ids[i][batch.answers[i]], end] for i in range(batch.n)])
    log_p = model(**long.inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
    ids = long.inputs["input_ids"][:, 1:]
    answer = torch.tensor([[role == "answer" for role in row] for row in long.token_roles()])[:, 1:]
    loss = -log_p.gather(-1, ids[..., None])[..., 0][answer].mean()
    loss.backward()
    moved = [p for p in model.parameters() if p.requires_grad]
    norm = torch.sqrt(sum(p.grad.square().sum() for p in moved if p.grad is not None))  # type: ignore[arg-type]
    for p in moved:
        if p.grad is not None:
            p.grad *= min(1.0, 0.5 / float(norm))
    optimizer = torch.optim.AdamW(moved, lr=1e-3, weight_decay=0.1)
    optimizer.step()

    row = loop.take_step()
    assert row["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert row["gradient"] == pytest.approx(float(norm.detach()), rel=1e-4)
    assert row["tokens"] == int(answer.sum())
    for (name, mine), (_, other) in zip(loop.hf.named_parameters(), model.named_parameters(), strict=True):
        # AdamW's first step is lr * sign(gradient): where the gradient is rounding noise its sign may differ
        assert float((mine - other).detach().abs().mean()) < 2e-5, name


def test_cutting_a_step_into_batches_does_not_change_it(tmp_path: Path) -> None:
    whole = loop_of("llava", tmp_path / "a", batch=4, accumulation=1)
    parts = loop_of("llava", tmp_path / "b", batch=1, accumulation=4)
    one, other = whole.take_step(), parts.take_step()
    for key in one:
        assert one[key] == pytest.approx(other[key], rel=1e-4), key  # padding changes the order of float32 sums


def test_recomputed_activations_give_the_same_gradient(tmp_path: Path) -> None:
    norms, calls = [], []
    for name, save_memory in (("a", False), ("b", True)):
        loop = loop_of("llava", tmp_path / name, save_memory=save_memory)
        seen: list[int] = []
        loop.hf.get_decoder().layers[1].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        norms.append(loop.take_step()["gradient"])
        calls.append(len(seen))
    assert calls == [1, 2]  # once more in the backward pass
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_the_loss_falls_on_episodes_seen_again_and_again(tmp_path: Path) -> None:
    loop = loop_of("qwen2_5_vl", tmp_path / "run", feed=Feed(draw(2, 0), 2), steps=40, lr=3e-3)
    losses = [loop.take_step()["loss"] for _ in range(40)]
    assert losses[-1] < 0.2 * losses[0]


def test_a_loss_that_is_no_number_is_an_error_and_leaves_the_weights(tmp_path: Path) -> None:
    loop = loop_of("qwen2_5_vl", tmp_path / "run")
    with torch.no_grad():
        loop.hf.get_output_embeddings().weight[0] = math.nan
    before = {name: p.detach().clone() for name, p in loop.weights.items()}
    with pytest.raises(NotFiniteError, match="loss must be finite"):
        loop.take_step()
    assert all(torch.equal(before[n], p) or n.endswith("lm_head.weight") for n, p in loop.weights.items())
    assert loop.step == 0


# --- what moves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("projector", [False, True])
def test_what_is_frozen_does_not_move_and_what_is_not_does(family: str, lora: bool, projector: bool, tmp_path: Path) -> None:
    model = tiny(family)
    before = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    names = projector_names(model.hf)
    run = adapt(model, tmp_path / "run", data=draw, lora=lora, projector=projector, lr=1e-2, **SOME)
    assert all(torch.equal(p, before[n]) for n, p in model.hf.named_parameters())  # the caller's model is left alone
    after = dict(mechicl.load(run.result, check=False).hf.named_parameters())
    moved = {name for name, p in before.items() if not torch.equal(p, after[name])}
    whole = {name for name in before if any(name.startswith(f"{module}.") for module in names)}
    decoder = set(decoder_names(model.hf))
    tower = set(before) - whole - decoder
    assert tower
    assert not moved & tower
    assert bool(moved & whole) == projector
    layers = {name for name in decoder if ".layers." in name and before[name].dim() == 2}
    assert len(moved & layers) == len(layers)
    if lora:
        assert moved <= layers | whole


@pytest.mark.parametrize("family", TINY)
def test_adapters_added_into_the_weights_give_the_adapted_models_logits(family: str, tmp_path: Path) -> None:
    import copy

    from mechicl.models.adapters import merged_copy

    model = tiny(family)
    hf = copy.deepcopy(model.hf)
    adapted = choose(hf, lora=True, projector=True, rank=3, alpha=6.0, dropout=0.1, base="", seed=0)
    batch = model.render(concepts.draw(2, classes=2, shots=1, size=28, seed=4))
    with torch.no_grad():
        fresh = HookedVLM(hf, model.processor, check=False)(batch)
        assert torch.allclose(fresh, model(batch), atol=1e-6)  # B starts at zero
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
        apart = HookedVLM(hf, model.processor, check=False)(batch)
        joint = HookedVLM(merged_copy(adapted), model.processor, check=False)(batch)
    assert float((apart - fresh).abs().max()) > 0.05  # the adapters do something
    assert torch.allclose(apart, joint, atol=1e-5)  # float32: W x + B A x against (W + B A) x


def test_an_adapter_folder_loads_merged_through_mechicl_and_through_peft(tmp_path: Path) -> None:
    run = adapt("demo", tmp_path / "run", data=draw, lr=1e-2, merged=True, **SOME)
    assert run.adapter is not None
    assert run.model is not None
    assert sorted(p.name for p in run.adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    episodes = concepts.draw(2, classes=2, shots=1, size=28, seed=4)
    one, other, base = mechicl.load(run.adapter), mechicl.load(run.model), mechicl.load("demo")
    with torch.no_grad():
        a, b, c = (model(model.render(episodes)) for model in (one, other, base))
        from peft import PeftModel

        from mechicl.models.adapters import quietly

        with quietly():
            theirs = PeftModel.from_pretrained(base.hf, str(run.adapter))  # type: ignore[arg-type]
        d = theirs(**base.render(episodes).inputs).logits[:, -1:]
    assert torch.equal(a, b)
    assert torch.allclose(a, d, atol=1e-5)
    assert float((a - c).abs().max()) > 0.01
    again = adapt(run.adapter, tmp_path / "again", data=draw, **SOME)  # an adapted model can be adapted
    assert mechicl.load(again.result).cfg.n_layers == 4


def test_a_damaged_or_pickled_adapter_is_refused(tmp_path: Path) -> None:
    run = adapt("demo", tmp_path / "run", data=draw, **SOME)
    assert run.adapter is not None
    weights = run.adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="must fit its base model"):
        mechicl.load(run.adapter)
    weights.rename(run.adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="must contain adapter_model"):
        mechicl.load(run.adapter)
    (run.adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="must name its base"):
        mechicl.load(run.adapter)


# --- the episodes --------------------------------------------------------------------------------------------------------


def test_the_episodes_of_a_step_depend_on_seed_and_number_only() -> None:
    feed = Feed(draw, 4, seed=3, general=draw_other, share=0.5)
    one, other = feed.step(2), [*Feed(draw, 4, seed=3, general=draw_other, share=0.5).step(2, slice(0, 2)), *feed.step(2, slice(2, 4))]
    assert [e.answer for e in one] == [e.answer for e in other]
    assert [e.answer for e in one] != [e.answer for e in Feed(draw, 4, seed=4, general=draw_other, share=0.5).step(2)]


def test_the_mix_has_its_share() -> None:
    main, general = draw(1, 0), draw_other(1, 0)
    feed = Feed(main, 1, general=general, share=0.3)
    n = 2000
    hits = sum(feed.episode(k) is general[0] for k in range(n))
    assert abs(hits / n - 0.3) < 4 * math.sqrt(0.3 * 0.7 / n)  # four standard errors


def test_a_list_is_gone_through_before_any_of_it_comes_again() -> None:
    few = draw(5, 0)
    feed = Feed(few, 5, seed=1)
    first, second = feed.step(0), feed.step(1)
    assert {id(e) for e in first} == {id(e) for e in second} == {id(e) for e in few}
    assert [id(e) for e in first] != [id(e) for e in second]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"steps": 0}, OptionError, "steps must be"),
        ({"lr": 0.0}, OptionError, "lr must be"),
        ({"rank": 0}, OptionError, "rank must be"),
        ({"alpha": -1.0}, OptionError, "alpha must be"),
        ({"dropout": 1.0}, OptionError, "dropout must be"),
        ({"dropout": 0.1, "lora": False}, OptionError, "dropout must be 0 without"),
        ({"warmup": 1.0}, OptionError, "warmup must be"),
        ({"clip": 0.0}, OptionError, "clip must be"),
        ({"checkpoint_every": 0}, OptionError, "checkpoint_every must be"),
        ({"data": None}, OptionError, "pool or data"),
        ({"data": []}, EpisodeError, "data must be"),
        ({"mix": 0.5}, OptionError, "general must be"),
        ({"general": draw}, OptionError, "mix must be above 0"),
        ({"general": draw, "mix": 1.5}, OptionError, "mix must be a share"),
        ({"strategy": "mix"}, OptionError, "general must be"),
        ({"device": "cuda:3"}, DeviceError, "device must be"),
        ({"probe": []}, EpisodeError, "non-empty"),
        ({"probe": draw(4, 0), "measure_at": [9]}, OptionError, "measure_at must be"),
        ({"probe": draw(4, 0), "measure_at": 1}, OptionError, "measure_at must be"),
        ({"probe": draw(3, 0)}, OptionError, "at least 4"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    options: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        adapt("demo", tmp_path / "run", **({**SOME, "data": draw} | options))
    assert not (tmp_path / "run").exists()


def test_other_files_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputPathError, match="other files"):
        adapt("demo", tmp_path, data=draw, **SOME)
    with pytest.raises(CheckpointError):
        AdaptRun.open(tmp_path)


def test_prompts_of_mllama_are_grouped_by_their_pictures(tmp_path: Path) -> None:
    few = [*draw(2, 0), *concepts.draw(2, classes=2, shots=2, size=28, seed=1)]
    loop = loop_of("mllama", tmp_path / "run", feed=Feed(few, 4), batch=4)
    assert sorted(one.labels.shape[0] for one in loop.lessons()) == [2, 2]
    assert math.isfinite(loop.take_step()["loss"])


def test_shots_of_the_query_are_never_in_the_loss() -> None:
    model, processor = build("llava")
    batch = Renderer(processor, model.config).render(draw(2, 0))
    one = lesson(batch)
    for row, spans in enumerate(batch.spans):
        for span in spans:
            if span.role == "label" and span.shot != QUERY:
                assert (one.labels[row, span.start : span.stop] == IGNORED).all()
