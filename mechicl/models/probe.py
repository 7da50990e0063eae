"""Short prompts for looking at a model once: to find its parts, to check it, to diagnose it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from mechicl.errors import OptionError
from mechicl.models.families import image_token_id
from mechicl.prompts.calling import arranged, asked, first_frames, named

N_TOKENS = 13
"""Length of the text probe; a prime, so that it is not mistaken for a number of heads."""


def text_probe(hf: Any, *, n: int = N_TOKENS, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """Random token ids without any special token of the configuration [batch, n], with its attention mask."""
    vocab = hf.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (batch, 4 * n), generator=generator)
    special = {
        image_token_id(hf.config),
        *(v for k, v in hf.config.to_dict().items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)),
    }
    text = hf.config.get_text_config().to_dict()
    special |= {v for k, v in text.items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)}
    keep = torch.stack([torch.tensor([t for t in row.tolist() if t not in special][:n]) for row in ids])
    return {"input_ids": keep, "attention_mask": torch.ones_like(keep)}


def picture(size: tuple[int, int] = (64, 48), seed: int = 0) -> Image.Image:
    """A coloured noise picture (width, height)."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def picture_probe(
    processor: Any, texts: Sequence[str] = ("one two",), *, size: tuple[int, int] = (64, 48), padding_side: str = "left"
) -> dict[str, Any]:
    """One picture and a text per row, through the processor's own template where it has one.

    Raises:
        OptionError: there is no processor.
    """
    if processor is None:
        raise OptionError("processor must be given for a probe with a picture; got None. Wrap the model as HookedVLM(model, processor).")
    pictures = [picture(size, seed) for seed in range(len(texts))]
    frames = first_frames(processor)
    if frames:  # it writes the picture's tokens itself
        prompts = list(texts)
    elif getattr(processor, "chat_template", None):
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
            for image, text in zip(pictures, texts, strict=True)
        ]
        prompts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    else:
        prompts = [f"{getattr(processor, 'image_token', '<image>')}{text}" for text in texts]
    padding = {"padding": True, "padding_side": padding_side} if len(texts) > 1 else {}
    extra = {} if getattr(processor, "chat_template", None) is None else {"add_special_tokens": False}
    shown = arranged(processor, [[p] * (frames or 1) for p in pictures])
    return named(
        processor(text=prompts, images=shown, return_tensors="pt", return_mm_token_type_ids=True, **padding, **extra, **asked(processor))
    )


def probe_inputs(hf: Any, processor: Any = None, *, pictures: bool = False) -> dict[str, Any]:
    """A probe with a picture if asked for and a processor is there; a text otherwise."""
    return picture_probe(processor) if pictures and processor is not None else text_probe(hf)
