"""Attention rows of very long prompts on a tiny model: seconds and peak memory, by rows and (where it fits) with whole patterns.

python -m benchmarks.long_prompts 16384 32768
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import torch

LAYERS, HEADS, WIDTH = 2, 4, 64


def tiny() -> object:
    """A random two-layer Qwen2-VL whose context holds 65,536 tokens."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    from mechicl.models.vlm import HookedVLM

    text = {
        "vocab_size": 512, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": 2, "max_position_embeddings": 1 << 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": WIDTH, "patch_size": 14}
    torch.manual_seed(0)
    ids = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}
    hf = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids))
    return HookedVLM(hf, name="tiny", check=False)


def measure(n: int, how: str) -> tuple[float, float]:
    """(seconds, peak megabytes above the model's own) of one prompt of n tokens."""
    model = tiny()
    ids = torch.randint(0, 490, (1, n), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if how == "rows":
        every = torch.arange(0, n, 8)
        model.attention_rows(batch, every, reduce=lambda layer, dest, rows: rows.amax((2, 3)))  # type: ignore[attr-defined]
    elif how == "forward":
        with torch.no_grad():
            model(batch)  # type: ignore[operator]
    else:
        with torch.no_grad():
            model.run_with_cache(batch, names_filter=[f"blocks.{k}.attn.hook_pattern" for k in range(LAYERS)])  # type: ignore[attr-defined]
    seconds = time.perf_counter() - start
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Each measurement in a process of its own, so that peaks do not mix."""
    if len(sys.argv) == 4 and sys.argv[1] == "one":
        torch.set_num_threads(1)
        print(*measure(int(sys.argv[2]), sys.argv[3]))
        return
    for n in [int(x) for x in sys.argv[1:]] or [16384]:
        for how in ("forward", "rows", "pattern"):
            if how == "pattern" and n > 8192:
                print(f"{n:>6} {how:<8} not run: one pattern is {HEADS * n * n * 4 / 1e9:.1f} GB a layer")
                continue
            out = subprocess.run(
                [sys.executable, "-m", "benchmarks.long_prompts", "one", str(n), how], capture_output=True, text=True, check=True
            )
            seconds, megabytes = (float(x) for x in out.stdout.split())
            print(f"{n:>6} {how:<8} {seconds:8.1f} s {megabytes:8.0f} MB")


if __name__ == "__main__":
    main()
