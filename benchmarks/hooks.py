"""What hooks cost: python -m benchmarks.hooks

One LLaVA-shaped model with random weights (a family that TransformerLens' bridge supports), a prompt with two pictures, one process, interleaved
rounds: plain forward, mechicl with nothing attached / rows only / every pattern read / everything cached, TransformerLens' bridge, nnsight.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable

import nnsight
import torch

from benchmarks.measure import machine, peak_memory, ratio, rounds, table
from mechicl.models.probe import picture
from mechicl.models.vlm import HookedVLM
from mechicl.training.organisms import build

TEXT = {
    "num_hidden_layers": 12,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
}


def entries(length: int) -> dict[str, Callable[[], object]]:
    """The competitors, each on its own copy of the same weights (the bridge changes the model it is given)."""
    hf, processor = build("llava", preset="tiny", text={**TEXT, "max_position_embeddings": 8192})
    model = HookedVLM(hf, processor)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what is this? " * 400}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = dict(processor(text=[prompt], images=[[picture(seed=0), picture(seed=1)]], return_tensors="pt", add_special_tokens=False))
    inputs = {k: v[:, :length] if v.dim() == 2 else v for k, v in inputs.items()}
    shape = inputs["input_ids"].shape
    assert shape == (1, length), shape
    patterns: dict[str, Callable[[], object]] = {
        "plain forward (sdpa)": lambda: hf(**inputs, use_cache=False, logits_to_keep=1),
        "mechicl, nothing attached": lambda: model(inputs),
        "mechicl, last token's rows": lambda: model.attention_rows(inputs),
        "mechicl, every pattern": lambda: model.run_with_cache(inputs, names_filter=lambda n: n.endswith("hook_pattern")),
        "mechicl, everything cached": lambda: model.run_with_cache(inputs),
    }

    patterns["nnsight, nothing read but logits"] = lambda: trace_logits(model, inputs)
    patterns["nnsight, every layer's output"] = lambda: trace_layers(model, inputs)
    other, _ = build("llava", preset="tiny", text={**TEXT, "max_position_embeddings": 8192})
    bridge = _bridge(other, processor)
    if bridge is not None:
        ids, extra = inputs["input_ids"], {k: v for k, v in inputs.items() if k != "input_ids"}
        patterns["TransformerLens bridge, nothing attached"] = lambda: bridge(ids, **extra)
        patterns["TransformerLens bridge, every pattern"] = lambda: bridge.run_with_cache(
            ids, names_filter=lambda n: n.endswith("hook_pattern"), **extra
        )
        patterns["TransformerLens bridge, everything cached"] = lambda: bridge.run_with_cache(ids, **extra)
    return patterns


def trace_logits(model: HookedVLM, inputs: dict[str, torch.Tensor]) -> object:
    """nnsight, the logits saved."""
    with model.trace(inputs):
        out = model.nnsight.output.logits[:, -1].save()
    return out


def trace_layers(model: HookedVLM, inputs: dict[str, torch.Tensor]) -> object:
    """nnsight, the output of every decoder layer saved."""
    with model.trace(inputs):
        out = nnsight.save([layer.output for layer in model.nnsight.model.language_model.layers])
    return out


def _bridge(hf: torch.nn.Module, processor: object) -> Callable[..., object] | None:
    """TransformerLens' bridge on a model in memory; None (said in the table's absence) where it does not boot."""
    try:
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        return build_bridge_from_module(hf, "LlavaForConditionalGeneration", hf_config=hf.config)
    except (ImportError, AttributeError, TypeError, KeyError, ValueError, RuntimeError) as error:
        print(f"TransformerLens' bridge did not boot here: {type(error).__name__}: {error}")
        return None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with torch.no_grad():
        competitors = entries(args.length)
        seconds = rounds(competitors, args.rounds)
        memory = {name: peak_memory(run) for name, run in competitors.items()}
    base = seconds["plain forward (sdpa)"]
    rows = [
        [name, f"{statistics.median(s) * 1e3:.0f} ms", f"{ratio(s, base):.2f}x", f"{memory[name]:.0f} MB"] for name, s in seconds.items()
    ]
    print(f"12 layers x 8 heads, d_model 256, {args.length} tokens, two pictures, float32, {args.rounds} rounds; {machine()}\n")
    print(table(["", "median", "against plain", "peak memory above start"], rows))


if __name__ == "__main__":
    main()
