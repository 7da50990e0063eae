"""Keys and values of asked tokens: the same numbers as a whole cache, as Hugging Face's own projections and as nnsight's, in every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from conftest import unchecked
from torch import Tensor

import mechicl
from mechicl.analysis.shift.read import KVRows, Rows, read_kv, rows_of
from mechicl.data import concepts
from mechicl.errors import EmptySpanError, NotFiniteError, OptionError, UnsupportedModelError
from mechicl.models.planted import untrained
from mechicl.models.toys.config import toy_config
from mechicl.models.toys.parts import ToyBlock
from mechicl.models.toys.prompts import ToyRenderer, ToyVocabulary, toy_batch
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.align import span_groups
from mechicl.prompts.batch import Batch
from mechicl.training.organisms import FAMILIES

Organism = Callable[..., tuple[Any, Any]]


def uneven(model: Any) -> Batch:
    """Two prompts of different lengths: the first is padded on the left."""
    one, two = concepts.draw(2, classes=2, shots=1, size=28, seed=3)
    mixed = model.family.image_tokens  # Mllama renders prompts of one number of pictures only
    return model.render([one.without_shots() if mixed else one, two])


def asked(batch: Batch) -> dict[str, Tensor]:
    """The query's spans and one of the examples, which the first prompt does not have."""
    groups = span_groups(batch)
    return {name: groups[name] for name in ("query image", "query question", "last token", "right label") if name in groups}


def torch_hooks(model: HookedVLM) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.hf.modules())


def projected(model: HookedVLM, batch: Batch) -> dict[tuple[str, int], Tensor]:
    """The independent path: plain torch hooks on the modules that Hugging Face's own attention calls, k_norm where there is one."""
    caught: dict[tuple[str, int], Tensor] = {}
    handles = []
    for layer, part in enumerate(model.anatomy.layers):
        attention = cast(Any, part.attention)
        norm = getattr(attention, "k_norm", None)
        for letter, module in (("k", norm if norm is not None else attention.k_proj), ("v", attention.v_proj)):

            def catch(_: Any, __: Any, out: Tensor, key: tuple[str, int] = (letter, layer), d_head: int = part.d_head) -> None:
                flat = out if out.dim() == 3 else out.flatten(2) if out.shape[1] == batch.n_pos else out.transpose(1, 2).flatten(2)
                caught[key] = flat.unflatten(-1, (-1, d_head))

            handles.append(module.register_forward_hook(catch))
    with torch.no_grad():
        model.hf(**model.inputs(batch), use_cache=False)
    for handle in handles:
        handle.remove()
    return caught


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_equal_the_whole_cache_and_hugging_faces_own_projections_in_every_family(kind: str, organism: Organism) -> None:
    model = HookedVLM(*organism(kind), check=False)
    batch = uneven(model)
    logits = model(batch)
    before = torch_hooks(model)  # transformers leaves some of its own at the first pass
    found = read_kv(model, batch, asked(batch))
    own = projected(model, batch)
    _, cache = model.run_with_cache(batch, names_filter=lambda name: name.endswith(("hook_k", "hook_v")))
    cfg = model.cfg
    assert isinstance(found, KVRows)
    for part in ("k", "v"):
        assert found[part].shape[:3] == (2, cfg.n_layers, cfg.n_key_value_heads)
        for layer in range(cfg.n_layers):
            if model.anatomy.layers[layer].cross:  # Mllama: keys of pictures that are no tokens
                assert "cross-attention" in found.reasons[part, layer]
                assert found[part][:, layer].isnan().all()
                continue
            for i in range(2):
                places = found.rows.positions[i][found.rows.known[i]]
                mine = found[part][i, layer, :, : len(places)].transpose(0, 1)
                # the same modules on the same inputs: no other rounding
                assert torch.equal(mine, cache[f"blocks.{layer}.attn.hook_{part}"][i, places])
                assert torch.equal(mine, own[part, layer][i, places])
                assert found[part][i, layer, :, len(places) :].isnan().all()
    assert cfg.n_key_value_heads < cfg.n_heads  # grouped queries in every one of them
    assert torch_hooks(model) == before
    assert torch.equal(model(batch), logits)  # the pass that was cut short has left nothing behind


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_rows_equal_what_nnsight_reads(kind: str, organism: Organism) -> None:
    model = HookedVLM(*organism(kind), check=False)
    batch = uneven(model)
    found = read_kv(model, batch, batch.query_pos[:, None])
    layers = model.nnsight.model.language_model.layers
    saved = []
    with torch.no_grad(), model.trace(batch):
        for layer in range(model.cfg.n_layers):
            attention = layers[layer].self_attn
            for name in ("v_proj", "k_norm") if kind == "gemma3" else ("k_proj", "v_proj"):
                saved.append(getattr(attention, name).output.save())
    for layer in range(model.cfg.n_layers):
        first, second = saved[2 * layer : 2 * layer + 2]
        k, v = (second.transpose(1, 2).flatten(2), first) if kind == "gemma3" else (first, second)
        for part, whole in (("k", k), ("v", v)):
            mine = found[part][:, layer, :, 0].flatten(1)
            assert torch.allclose(mine, whole[torch.arange(2), batch.query_pos], atol=1e-6)  # nnsight may leave another attention kernel on


def test_toys_are_read_the_same_way_and_padding_changes_nothing() -> None:
    model = untrained(norm="RMS", positions="rope")
    episodes = toy_batch(3, classes=3).episodes
    batch = model.render([episodes[0].without_shots(), *episodes[1:]])
    found = read_kv(model, batch, {"query": span_groups(batch)["last token"], "everything": batch.inputs["attention_mask"].bool()})
    _, cache = model.run_with_cache(batch)
    for layer in range(2):
        for i in range(3):
            places = found.rows.positions[i][found.rows.known[i]]
            assert torch.equal(found["k"][i, layer, :, : len(places)].transpose(0, 1), cache["k", layer][i, places])
    alone = read_kv(model, model.render([episodes[0].without_shots()]), torch.tensor([-1]))
    assert torch.allclose(found["v"][0, :, :, 0], alone["v"][0, :, :, 0], atol=1e-6)
    assert torch.allclose(found.mean("v", "query")[0], alone["v"][0, :, :, 0], atol=1e-6)


def test_the_pass_stops_at_the_last_layer_asked_for() -> None:
    model = mechicl.load("demo")
    batch = model.render(concepts.draw(1, classes=2, shots=1, size=28))
    reached: list[int] = []
    handles = [
        part.block.register_forward_pre_hook(lambda *_, layer=layer: reached.append(layer))
        for layer, part in enumerate(model.anatomy.layers)
    ]
    try:
        read_kv(model, batch, torch.tensor([-1]), layers=[0])
    finally:
        for handle in handles:
            handle.remove()
    assert reached == [0]


def test_reduce_sees_each_layers_rows_and_only_what_it_returns_is_kept() -> None:
    model = untrained()
    batch = toy_batch(2, classes=2)
    kept = read_kv(model, batch, torch.tensor([[0, 2], [1, -1]]))
    seen = []

    def reduce(part: str, layer: int, values: Tensor, rows: Rows) -> Tensor:
        seen.append((part, layer, tuple(values.shape)))
        assert values[1, 1].isnan().all()  # no such row
        assert rows.positions.tolist() == [[0, 2], [1, -1]]
        return values.norm(dim=-1)

    norms = read_kv(model, batch, torch.tensor([[0, 2], [1, -1]]), reduce=reduce)
    assert [one[:2] for one in seen] == [("k", 0), ("v", 0), ("k", 1), ("v", 1)]
    assert all(shape == (2, 2, 4, 16) for _, _, shape in seen)
    torch.testing.assert_close(norms["k"][1].transpose(1, 2), kept["k"][:, 1].norm(dim=-1), equal_nan=True)


def test_an_active_edit_is_what_is_read() -> None:
    model = untrained()
    batch = toy_batch(2, classes=2)

    def double(values: Tensor, hook: Any) -> Tensor:
        return 2 * values

    plain = read_kv(model, batch, torch.tensor([-1]))
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", double)]):
        edited = read_kv(model, batch, torch.tensor([-1]))
    assert torch.equal(edited["k"][:, 0], plain["k"][:, 0])
    assert not torch.allclose(edited["k"][:, 1], plain["k"][:, 1])
    assert torch.equal(read_kv(model, batch, torch.tensor([-1]))["k"], plain["k"])


def test_rows_of_overlapping_spans_are_read_once() -> None:
    batch = toy_batch(2, classes=2)
    groups = span_groups(batch)
    rows = rows_of(batch, {"labels": batch.mask("label"), "right": groups["right label"]})
    assert rows.positions.shape == (2, 2)
    assert rows.spans["labels"].all()
    assert rows.spans["right"].sum(1).tolist() == [1, 1]
    assert rows.positions[rows.spans["right"]].tolist() == groups["right label"].nonzero()[:, 1].tolist()
    assert rows_of(batch.inputs["input_ids"], torch.tensor([0, -1])).positions.tolist() == [[0, 4], [0, 4]]


def test_layers_with_fewer_heads_are_padded_and_layers_of_other_widths_need_reduce() -> None:
    model = untrained(n_heads=4)
    model.blocks[1] = few = ToyBlock(toy_config(n_heads=2))
    model.setup()
    batch = toy_batch(2, classes=2)
    found = read_kv(model, batch, torch.tensor([-1]))
    assert few.attn.cfg.n_heads == 2
    assert not found["k"][:, 0].isnan().any()
    assert found["k"][:, 1, 2:].isnan().all()
    assert not found["k"][:, 1, :2].isnan().any()
    model.blocks[1] = ToyBlock(toy_config(n_heads=2, d_head=8))
    model.setup()
    with pytest.raises(UnsupportedModelError, match="as wide"):
        read_kv(model, batch, torch.tensor([-1]))
    widths = read_kv(model, batch, torch.tensor([-1]), reduce=lambda part, layer, values, rows: values.shape[-1])
    assert widths["v"] == [16, 8]


def test_what_cannot_be_read_is_refused(organism: Organism) -> None:
    model, batch = untrained(), toy_batch(2, classes=2)
    last = torch.tensor([-1])
    with unchecked():
        for where, error in (
            ({"a": torch.ones(2, 3, dtype=torch.bool)}, OptionError),
            ({}, OptionError),
            ({"a": torch.zeros(2, 5, dtype=torch.bool)}, EmptySpanError),
            (torch.tensor([5]), OptionError),
            (torch.zeros(3, 1, dtype=torch.long), OptionError),
            (torch.full((2, 1), -1), EmptySpanError),
        ):
            with pytest.raises(error):
                read_kv(model, batch, where)
        wrong: list[dict[str, Any]] = [
            {"parts": ()},
            {"parts": ("q",)},
            {"parts": ("k", "k")},
            {"layers": [2]},
            {"layers": []},
            {"layers": [0, 0]},
        ]
        for options in wrong:
            with pytest.raises(OptionError):
                read_kv(model, batch, last, **options)
    mllama = HookedVLM(*organism("mllama"), check=False)
    cross = next(layer for layer, part in enumerate(mllama.anatomy.layers) if part.cross)
    prompt = mllama.render(concepts.draw(1, classes=2, shots=1, size=28))
    with pytest.raises(UnsupportedModelError, match="cross-attention"):
        read_kv(mllama, prompt, last, layers=[cross])
    broken = untrained()
    broken.W_E.data[:, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="layer 0"):
        read_kv(broken, batch, last)
    assert not any(point.fwd_hooks for point in broken.hook_dict.values())  # nothing left behind by the error


def test_bigger_vocabularies_and_beginnings_of_sequence_move_the_rows_along() -> None:
    renderer = ToyRenderer(ToyVocabulary(8, 8), bos=True)
    model = untrained(renderer=renderer)
    batch = toy_batch(2, classes=2, renderer=renderer)
    found = read_kv(model, batch, {"last token": span_groups(batch)["last token"]})
    assert found.rows.positions[:, 0].tolist() == batch.query_pos.tolist()
