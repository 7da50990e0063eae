"""Variations of a recorded run: equal to the naive loop of full runs with hooks in every family and on toys, whatever is edited and wherever it starts; memory
that runs out, errors, and nothing left behind."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from conftest import example_batch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mechicl
from mechicl.data.concepts import draw
from mechicl.data.gaussian import MultimodalTask
from mechicl.data.gaussian import draw as draw_vectors
from mechicl.errors import HookNameError, HookNotFiredError, OptionError, UnsupportedModelError
from mechicl.models.planted import planted_vectors
from mechicl.models.resuming import attention as resume_attention
from mechicl.models.resuming import memory as resume_memory
from mechicl.models.resuming.resume import Cell, Recorded, record, run_cells
from mechicl.models.toys.model import ToyTransformer, toy_config
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.vectors import to_batch
from mechicl.training.organisms import FAMILIES, build

EQUAL = 1e-5
"""Largest difference of logits in standard deviations: the two ways add the same float32 numbers in another order."""
POINTS = (
    "hook_resid_pre", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_attn_scores", "attn.hook_pattern",
    "attn.hook_z", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post",
)  # fmt: skip
TOYS = {
    "rope": {"positions": "rope", "norm": "RMS", "mlp": "swiglu"},
    "learned": {"positions": "learned", "norm": "LN", "mlp": "gelu", "qkv_bias": True},
    "alibi": {"positions": "alibi", "mlp": "silu"},
    "attention only": {"positions": "none", "norm": "RMS"},
    "one-hot places": {"inputs": "vectors", "d_input": 16, "positions": "one_hot+rope", "n_places": 20, "mlp": "product", "norm": "RMS"},
    "no projection": {
        "inputs": "vectors",
        "d_input": 32,
        "positions": "rope",
        "output_projection": False,
        "n_heads": 2,
        "classifier": "mlp",
    },
}


@cache
def hooked(family: str) -> HookedVLM:
    return HookedVLM(*build(family, preset="tiny"), name=family)


@cache
def toy(name: str) -> tuple[ToyTransformer, dict[str, torch.Tensor]]:
    model = ToyTransformer(toy_config(n_layers=3, **TOYS[name]), seed=1)
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, :3] = 0
    if model.cfg.inputs == "vectors":
        return model, {"inputs_embeds": torch.randn(3, 11, model.cfg.d_input, generator=generator), "attention_mask": mask}
    return model, {"input_ids": torch.randint(0, 60, (3, 11), generator=generator), "attention_mask": mask}


def naive(recorded: Recorded, cell: Cell) -> torch.Tensor:
    """One full run with hooks."""
    hooks: list[tuple[str, Any]] = []
    if cell.stream is not None:
        stream = cell.stream() if callable(cell.stream) else cell.stream
        hooks.append((f"blocks.{cell.layer}.hook_resid_{cell.at}", lambda x, *, hook: torch.cat([x[:, : cell.start], stream], 1)))
    for name, edit in cell.edits.items():
        axis = 2 if name.endswith(("scores", "pattern")) else 1

        def change(x: torch.Tensor, *, hook: Any, edit: Any = edit, axis: int = axis) -> torch.Tensor:
            kept, rows = x.narrow(axis, 0, cell.start), x.narrow(axis, cell.start, x.shape[axis] - cell.start)
            return torch.cat([kept, edit(rows.clone())], axis)

        hooks.append((name, change))
    with torch.no_grad():
        return recorded.model.run_with_hooks(recorded.batch, positions=recorded.positions, fwd_hooks=hooks)


def same(recorded: Recorded, cells: list[Cell], *, moves: bool = True, within: float = EQUAL) -> None:
    """Every cell against the naive loop; and (control) cells before the last layer change the logits."""
    found = run_cells(recorded, cells)
    for cell, logits in zip(cells, found, strict=True):
        want = naive(recorded, cell)
        gap = float((logits - want).abs().max() / want.std())
        assert gap < within, (cell.layer, cell.at, cell.start, list(cell.edits), gap)
        moved = float((want - recorded.logits).abs().max() / want.std())
        last = any(name.startswith(f"blocks.{recorded.model.cfg.n_layers - 1}.") for name in cell.edits)
        assert moved > 10 * EQUAL or not moves or not cell.edits or last, (cell.start, list(cell.edits), "the cell changes nothing")


def scaled(by: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * by


def mixed(by: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Not a multiple: a norm behind the hook point would undo that."""
    return lambda x: x * by + 0.5 * x.roll(1, -1)


def variations(recorded: Recorded, starts: list[int], seed: int = 0) -> list[Cell]:
    """Streams before and inside every layer, and an edit at every hook point of every layer, entered there and one layer earlier."""
    generator = torch.Generator().manual_seed(seed)
    model, cells = recorded.model, []
    for layer in range(model.cfg.n_layers):
        pre = recorded.pre(layer)
        for start in {starts[layer % len(starts)], starts[-1]}:
            noise = torch.randn(pre[:, start:].shape, generator=generator)
            cells.append(Cell(layer, "pre", start, pre[:, start:] + noise))
            if f"blocks.{layer}.hook_resid_mid" in model.hook_dict:
                cells.append(
                    Cell(layer, "mid", start, lambda layer=layer, start=start, noise=noise: recorded.mid(layer)[:, start:] + noise)
                )
        for k, point in enumerate(POINTS):
            name, start = f"blocks.{layer}.{point}", starts[k % len(starts)]
            cross = isinstance(model, HookedVLM) and model.anatomy.layers[layer].cross
            if name in model.hook_dict and not (cross and point.endswith(("_k", "_v"))):
                by = 0.5 + float(torch.rand((), generator=generator))
                edit = scaled(by) if point.endswith("scores") else mixed(by)  # scores of what may not be read stay minus infinity
                cells.append(Cell(max(0, layer - k % 2), "pre", start, None, {name: edit}))
    return cells


@pytest.mark.parametrize("name", FAMILIES)
def test_cells_equal_full_runs_in_every_family(name: str) -> None:
    """Two prompts with two and one pictures, left-padded."""
    model = hooked(name)
    recorded = record(model, example_batch(model.processor))
    assert recorded.how == "resumed", recorded.notes
    n_pos = recorded.n_pos
    same(recorded, variations(recorded, [0, n_pos // 3, n_pos - 2]))


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "mllama", "llava"])
def test_one_prompt_without_padding_and_several_positions(name: str) -> None:
    model = hooked(name)
    batch = example_batch(model.processor, images=(2,))
    n_pos = batch["input_ids"].shape[1]
    recorded = record(model, batch, positions=torch.tensor([n_pos - 6, n_pos - 1]))
    assert recorded.how == "resumed", recorded.notes
    assert recorded.logits.shape[:2] == (1, 2)
    same(recorded, variations(recorded, [2, n_pos - 9, n_pos - 1], seed=1))  # the last starts behind a position that is read


@pytest.mark.parametrize("name", TOYS)
def test_cells_equal_full_runs_on_toys(name: str) -> None:
    model, batch = toy(name)
    recorded = record(model, batch)
    cells = variations(recorded, [0, 4, 9])
    if recorded.model.cfg.attn_only:  # no hook point for the naive loop to use
        cells = [cell for cell in cells if cell.at == "pre"]
    same(recorded, cells)


def test_vectors_with_a_second_modality() -> None:
    task = MultimodalTask(K1=64, K2=16, L=8, N=6, D1=64, D2=12, B=2, no_repeats=True)
    batch = to_batch(draw_vectors(task, 3, torch.Generator().manual_seed(0), split="ic"))
    sharp: Any = {"moves": False, "within": 1e-3}  # idle heads write where nobody reads; scores of hundreds lose digits before the softmax
    recorded = record(planted_vectors(task, n_heads=3, seed=2).model, batch)
    same(recorded, [cell for cell in variations(recorded, [0, 4]) if cell.at == "pre"], **sharp)
    same(recorded, [Cell(0, edits={name: mixed(0.5)}) for name in ("hook_embed", "hook_image_features")], **sharp)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_starts_move_to_where_nothing_earlier_looks_ahead(name: str) -> None:
    recorded = record(hooked(name), example_batch(hooked(name).processor))
    n_pos = recorded.n_pos
    assert recorded.starts[0] == 0
    assert all(at <= position for position, at in enumerate(recorded.starts))
    if name == "gemma3":  # a picture's tokens read each other both ways
        assert len(set(recorded.starts)) < n_pos
        ids = recorded.batch["input_ids"]
        picture = ids[0] == hooked(name).hf.config.image_token_id
        inside = [p for p in range(1, n_pos) if picture[p] and picture[p - 1]]
        assert inside
        assert all(recorded.starts[p] < p for p in inside)
    else:
        assert list(recorded.starts) == list(range(n_pos))


def test_what_the_model_adds_between_layers_is_kept() -> None:
    recorded = record(hooked("qwen3_vl"), example_batch(hooked("qwen3_vl").processor))
    added = [layer for layer, extra in enumerate(recorded.additions) if extra is not None]
    assert added, "DeepStack adds the pictures' features again"
    extra = recorded.additions[added[0]]
    assert extra is not None
    picture = recorded.batch["input_ids"] == hooked("qwen3_vl").hf.config.image_token_id
    assert float(extra[~picture].abs().max()) < 1e-5
    assert float(extra[picture].abs().max()) > 1e-2


@pytest.mark.parametrize("kind", ["vlm", "toy"])
def test_identities(kind: str) -> None:
    """The recorded stream again changes nothing; another prompt's stream, whole, gives that prompt's logits."""
    model = hooked("qwen2_5_vl") if kind == "vlm" else toy("rope")[0]
    batches = [example_batch(model.processor, seed=s) for s in (0, 7)] if isinstance(model, HookedVLM) else [toy("rope")[1], None]
    clean = record(model, batches[0])
    if batches[1] is None:
        batches[1] = {**batches[0], "input_ids": batches[0]["input_ids"].flip(0).flip(1) % 60}
    other = record(model, batches[1])
    n_layers = model.cfg.n_layers
    unchanged = run_cells(clean, [Cell(layer) for layer in range(n_layers)] + [Cell(0, "pre", 5, clean.pre(0)[:, 5:])])
    assert all(torch.allclose(x, clean.logits, atol=1e-5) for x in unchanged)
    if kind == "toy":  # same padding; the pictures' places of a production model belong to its prompt
        moved = run_cells(clean, [Cell(layer, "pre", 0, other.pre(layer)) for layer in range(n_layers)])
        assert all(torch.allclose(x, other.logits, atol=1e-5) for x in moved)
        assert not torch.allclose(clean.logits, other.logits, atol=1e-2)


def test_recorded_holds_what_full_runs_show() -> None:
    model = hooked("gemma3")
    batch = example_batch(model.processor)
    sites = ["blocks.1.attn.hook_pattern", "blocks.0.attn.hook_z"]
    recorded = record(model, batch, sites=sites)
    with torch.no_grad():
        logits, seen = model.run_with_cache(batch)
    assert torch.allclose(recorded.logits, logits, atol=1e-5)
    for layer in range(model.cfg.n_layers):
        assert torch.allclose(recorded.pre(layer), seen[f"blocks.{layer}.hook_resid_pre"], atol=1e-5)
        assert torch.allclose(recorded.mid(layer), seen[f"blocks.{layer}.hook_resid_mid"], atol=1e-5)
    assert torch.allclose(recorded.pre(model.cfg.n_layers), seen[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"], atol=1e-5)
    assert all(torch.allclose(recorded[name], seen[name], atol=1e-6) for name in sites)
    with pytest.raises(OptionError, match="kept"):
        recorded["blocks.0.hook_resid_pre"]


def test_edits_before_the_layers_run_in_full() -> None:
    """Embeddings, the projector's output and the vision tower."""
    model = hooked("qwen2_5_vl")
    recorded = record(model, example_batch(model.processor, images=(2, 2)))
    names = ["hook_embed", "hook_image_features", "vision.blocks.0.hook_resid_post"]
    cells = [Cell(0, "pre", 0, None, {name: scaled(by)}) for name in names for by in (0.5, 1.5)]
    same(recorded, cells)


def test_several_edits_of_one_cell_and_of_different_cells_do_not_mix() -> None:
    model = hooked("llava")
    recorded = record(model, example_batch(model.processor))
    both = {"blocks.1.attn.hook_z": scaled(0.0), "blocks.2.hook_mlp_out": scaled(2.0)}

    def in_place(x: torch.Tensor) -> torch.Tensor:
        x[:, :, 0] = 0.0
        return x

    cells = [
        Cell(1, "pre", 3, None, both),
        Cell(1, "pre", 3),
        Cell(1, "pre", 4, None, {"blocks.1.attn.hook_z": in_place}),
        Cell(1, "pre", 3, None, both),
    ]
    same(recorded, cells)
    first, nothing, _, again = run_cells(recorded, cells)
    assert torch.equal(first, again)
    assert torch.allclose(nothing, recorded.logits, atol=1e-5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_cells_in_any_order_and_any_number_at_once(data: st.DataObject) -> None:
    model, batch = toy("rope")
    recorded = record(model, batch)
    pool = variations(recorded, [0, 1, 6, 10], seed=3)
    cells = [pool[k] for k in data.draw(st.lists(st.integers(0, len(pool) - 1), min_size=1, max_size=9))]
    copies = data.draw(st.sampled_from([None, 1, 2, 5]))
    indices: list[int] = []
    kept = run_cells(recorded, cells, lambda logits, index: (indices.append(index), logits)[1], copies=copies)
    assert sorted(indices) == list(range(len(cells)))
    for cell, logits in zip(cells, kept, strict=True):
        assert torch.allclose(logits, naive(recorded, cell), atol=1e-4)


@pytest.mark.parametrize("few", [0, 1000])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("masked", ["none", "prompt", "heads", "float"])
def test_attention_over_shared_keys_is_attention(few: int, groups: int, masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the softmax written out over keys laid side by side, both ways of computing it."""
    monkeypatch.setattr(resume_attention, "FEW", few)
    n, copies, kv, dest, past, d = 2, 3, 2, 5, 4, 8
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(n * copies, kv * groups, dest, d, generator=generator)
    key, value = (torch.randn(n * copies, kv, dest, d, generator=generator) for _ in range(2))
    old = tuple(torch.randn(n, kv, past, d, generator=generator) for _ in range(2))
    causal = torch.ones(dest, past + dest, dtype=torch.bool).tril(past)[None, None]
    mask: torch.Tensor | None = None
    if masked == "prompt":
        mask = causal & (torch.arange(past + dest) >= torch.tensor([0, 2])[:, None])[:, None, None]
    elif masked == "heads":
        mask = (causal & (torch.rand(n, kv * groups, dest, past + dest, generator=generator) < 0.8)) | torch.eye(
            dest, past + dest, dtype=torch.bool
        )
    elif masked == "float":
        mask = torch.zeros(causal.shape).masked_fill(~causal, -torch.inf) + torch.randn(
            1, kv * groups, dest, past + dest, generator=generator
        )
    z = resume_attention.attend(query, [old, (key, value)], mask, scale=0.3, copies=copies, causal=True)
    keys, values = (
        torch.cat([a.repeat_interleave(copies, 0), b], 2).repeat_interleave(groups, 1) for a, b in zip(old, (key, value), strict=True)
    )
    scores = query @ keys.transpose(2, 3) * 0.3
    full = causal if mask is None else mask
    full = full if full.shape[0] == 1 else full.repeat_interleave(copies, 0)
    scores = scores.masked_fill(~full, -torch.inf) if full.dtype == torch.bool else scores + full
    assert torch.allclose(z, (scores.softmax(-1) @ values).transpose(1, 2), atol=1e-5)


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = toy("learned")
    recorded = record(model, batch)
    cells = [Cell(0, "pre", 0, None, {"blocks.0.attn.hook_z": scaled(k / 10)}) for k in range(12)]
    want, sizes, seen = run_cells(recorded, cells), [], []
    real = recorded.runner.run

    def small(job: Any) -> torch.Tensor:
        sizes.append(job.copies)
        if job.copies > 3:
            raise (
                torch.OutOfMemoryError("CUDA out of memory.")
                if len(sizes) % 2
                else RuntimeError("DefaultCPUAllocator: can't allocate memory")
            )
        return real(job)

    monkeypatch.setattr(recorded.runner, "run", small)
    found = run_cells(recorded, cells, copies=12, progress=seen.append)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, want, strict=True))
    assert sizes[:3] == [12, 6, 3]
    assert sum(seen) == 12

    def never(job: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(recorded.runner, "run", never)
    with pytest.raises(torch.OutOfMemoryError):
        run_cells(recorded, cells)
    assert not resume_memory.out_of_memory(RuntimeError("shapes do not match"))


def residue(model: Any) -> tuple[Any, ...]:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    listening = [name for name, point in model.hook_dict.items() if point.fwd_hooks]
    configs = [c._attn_implementation for c in model.anatomy.configs] if isinstance(model, HookedVLM) else []
    return hooks, listening, configs, torch.is_grad_enabled(), model.context_level


@pytest.mark.parametrize("kind", ["qwen3_vl", "toy"])
def test_nothing_is_left_behind_also_after_an_error(kind: str) -> None:
    model = toy("rope")[0] if kind == "toy" else hooked(kind)
    before = residue(model)
    recorded = record(model, toy("rope")[1] if kind == "toy" else example_batch(model.processor))
    want = recorded.logits.clone()

    def fails(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("mine")

    done: list[int] = []
    for point in ("attn.hook_z", "attn.hook_k", "hook_resid_post"):
        with pytest.raises(KeyError, match="mine"):
            run_cells(recorded, [Cell(0), Cell(1, "pre", 2, None, {f"blocks.1.{point}": fails})], lambda logits, k: done.append(k))
    assert done == [0, 0, 0], "what was finished before the error has been handed over"
    assert residue(model) == before
    assert torch.allclose(run_cells(recorded, [Cell(0)])[0], want, atol=1e-5)


def test_hooks_of_the_user_keep_listening() -> None:
    model = hooked("llava")
    recorded = record(model, example_batch(model.processor))
    shapes: list[tuple[int, ...]] = []
    last = f"blocks.{model.cfg.n_layers - 1}.hook_mlp_out"
    with model.hooks(fwd_hooks=[(last, lambda x, *, hook: shapes.append(tuple(x.shape)))]):
        run_cells(recorded, [Cell(0), Cell(0)])
        assert len(model.hook_dict[last].fwd_hooks) == 1
    assert shapes == [(2 * recorded.n, recorded.n_pos, model.cfg.d_model)], "a hook on the last layer sees every position"


def test_a_model_that_cannot_be_resumed_runs_in_full_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder whose layers do something else when they are called by themselves."""
    model = HookedVLM(*build("llava", preset="tiny"))
    batch = example_batch(model.processor)
    decoder, inside = model.hf.get_decoder(), {"whole": False}
    decoder.register_forward_pre_hook(lambda *_: inside.update(whole=True))
    decoder.register_forward_hook(lambda *_: inside.update(whole=False))
    decoder.layers[1].register_forward_hook(lambda m, args, out: out if inside["whole"] else out * 1.5)
    recorded = record(model, batch)
    assert recorded.how == "full"
    assert "cannot be resumed" in recorded.notes[0]
    same(recorded, [cell for cell in variations(recorded, [0, 5]) if cell.layer == 1])


def test_the_demo_model_and_rendered_batches() -> None:
    model = mechicl.load("demo")
    batch = model.render(draw(3, classes=2, shots=1, size=28, seed=0))
    recorded = record(model, batch)
    assert recorded.how == "resumed"
    same(recorded, variations(recorded, [7, recorded.n_pos // 2])[::4])


def test_refusals() -> None:
    model, batch = toy("rope")
    recorded = record(model, batch)
    d = model.cfg.d_model
    for cell, match in (
        (Cell(3), "layer"), (Cell(0, "pre", 11), "start"), (Cell(0, "post"), "at must"), (Cell(0, "pre", 2, torch.zeros(3, 11, d)), "stream"),
        (Cell(1, "pre", 0, None, {"blocks.0.attn.hook_z": scaled(1)}), "at or after"),
        (Cell(1, "mid", 0, None, {"blocks.1.attn.hook_z": scaled(1)}), "at or after"),
        (Cell(1, "pre", 0, None, {"hook_embed": scaled(1)}), "layer 0"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=match):
            run_cells(recorded, [cell])
    with pytest.raises(HookNameError, match="hook_zz"):
        run_cells(recorded, [Cell(0, edits={"blocks.0.attn.hook_zz": scaled(1)})])
    with pytest.raises(HookNameError):
        record(model, batch, sites=["blocks.0.hook_nothing"])
    with pytest.raises(OptionError, match="positions"):
        record(model, batch, positions="all")


def test_layers_that_a_prompt_skips() -> None:
    """Mllama's cross-attention layers, in a prompt without pictures."""
    model = hooked("mllama")
    given = example_batch(model.processor)
    cross = next(layer for layer, part in enumerate(model.anatomy.layers) if part.cross)
    with pytest.raises(UnsupportedModelError, match="after attention"):
        record(model, given).mid(cross)
    skipped = record(model, {"input_ids": given["input_ids"].clamp_max(20), "attention_mask": given["attention_mask"]})
    assert skipped.how == "resumed"
    moved = skipped.pre(cross)[:, 3:] * 1.5
    same(skipped, [Cell(0, "pre", 3, skipped.pre(0)[:, 3:] * 1.5), Cell(cross + 1, "pre", 3, moved)])
    there, behind = run_cells(skipped, [Cell(cross, "pre", 3, moved), Cell(cross + 1, "pre", 3, moved)])
    assert torch.equal(there, behind)
    with pytest.raises(HookNotFiredError, match="never"):
        run_cells(skipped, [Cell(cross, edits={f"blocks.{cross}.attn.hook_z": scaled(0)})])
