"""A family's processor, called: what it is given, what it returns, and where it put the pictures' tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image

from mechicl.errors import PaddingError, RenderError
from mechicl.prompts.fenced import fenced

NEEDED: Mapping[str, str] = {
    "qwen2_vl": "mm_token_type_ids",
    "qwen2_5_vl": "mm_token_type_ids",
    "qwen3_vl": "mm_token_type_ids",
    "gemma3": "token_type_ids",
    "paligemma": "token_type_ids",
    "mllama": "cross_attention_mask",
}
"""Inputs without which a family gives wrong logits and no error."""

RENAMED: Mapping[str, str] = {"pixel_values_images": "pixel_values"}
"""What a processor still calls by a name that its model gives up (Video-LLaVA)."""

BEFORE_EVERYTHING: Mapping[str, int] = {
    "Blip2Processor": 1,
    "FuyuProcessor": 1,
    "InstructBlipProcessor": 1,
    "InstructBlipVideoProcessor": 4,
}
"""Processors that put one picture's tokens before each prompt, whatever the text says of pictures, and how many frames they take for one."""

ONE_LIST = ("GotOcr2Processor",)
"""Processors that take the pictures of all prompts as one list: several to a prompt only this way (GOT-OCR 2 joins nested ones to one stretch of pages)."""

ASKED: Mapping[str, Mapping[str, Any]] = {"ChameleonProcessor": {"return_for_text_completion": True}}
"""What a processor must be asked for: Chameleon's otherwise ends every prompt with its separator, behind the place where the answer begins."""

Offsets = list[list[dict[str, Any]]]


def call(
    processor: Any, model_type: str, pictures: Sequence[Sequence[Image.Image]], texts: Sequence[str], **options: Any
) -> tuple[dict[str, Any], Offsets]:
    """The processor's output, whole, and where it put the pictures' tokens into each text.

    Raises:
        RenderError: the processor refuses the prompts, or leaves out an input without which its family is silently wrong.
    """
    some = any(pictures)
    given: dict[str, Any] = {
        "padding": True,
        "padding_side": "left",
        "return_tensors": "pt",
        "return_text_replacement_offsets": True,
        **asked(processor),
        **options,
    }
    if "mm_token_type_ids" in getattr(processor, "model_input_names", ()):  # some give it only when asked
        given["return_mm_token_type_ids"] = True
    try:
        with replacements(processor) as heard:
            out = named(processor(text=list(texts), images=arranged(processor, pictures) if some else None, **given))
    except Exception as error:
        raise RenderError(
            f"the processor must take the episodes; {type(processor).__name__} raised {error}. "
            "Check the pictures' sizes, and that every prompt has pictures if the family needs them."
        ) from error
    told = out.pop("text_replacement_offsets", None)
    out.pop("labels", None)  # a training target, not an input
    needed = NEEDED.get(model_type)
    if some and needed is not None and needed not in out:
        raise RenderError(f"the processor must return {needed} for {model_type}; got {sorted(out)}. Update transformers.")
    return out, told if isinstance(told, list) and told else heard or fenced(processor, texts)


def arranged(processor: Any, pictures: Sequence[Sequence[Image.Image]]) -> list[Any]:
    """Pictures as a processor takes them: a list for each prompt, or one list."""
    if takes_one_list(processor):
        return [picture for few in pictures for picture in few]
    return [list(few) for few in pictures]


def takes_one_list(processor: Any) -> bool:
    """Whether a processor takes the pictures of all prompts as one list."""
    return type(processor).__name__ in ONE_LIST


def asked(processor: Any) -> Mapping[str, Any]:
    """Options that a processor must be given."""
    return ASKED.get(type(processor).__name__, {})


def named(out: Mapping[str, Any]) -> dict[str, Any]:
    """A processor's output by the names that models take."""
    return {RENAMED.get(name, name): value for name, value in out.items()}


@contextmanager
def replacements(processor: Any) -> Iterator[Offsets]:
    """Filled, when the processor has run, with what its own replacement of placeholders said about places: some throw that away (Nemotron-H Omni)."""
    heard: Offsets = []
    replace = getattr(processor, "get_text_with_replacements", None)
    if replace is None:
        yield heard
        return

    def listening(*args: Any, **kwargs: Any) -> Any:
        text, places = replace(*args, **kwargs)
        heard[:] = places
        return text, places

    processor.get_text_with_replacements = listening  # on the object, in the way of its class's, for this call
    try:
        yield heard
    finally:
        del processor.get_text_with_replacements


def first_frames(processor: Any) -> int:
    """How many frames a processor writes before the whole prompt, whatever it says; 0 where pictures stand among the words.

    BLIP-2's leaves the words alone when it is told no number of query tokens.
    """
    kind = type(processor).__name__
    return 0 if leaves_words(processor) else BEFORE_EVERYTHING.get(kind, 0)


def leaves_words(processor: Any) -> bool:
    """Whether a processor with an image token expands nothing, so that the chat template writes all of a picture's tokens."""
    return type(processor).__name__ == "Blip2Processor" and processor.num_query_tokens is None


def check_order(processor: Any) -> None:
    """Refuse processors whose pictures cannot stand among the words.

    Raises:
        RenderError: every prompt begins with the tokens of its one picture.
    """
    if first_frames(processor):
        kind = type(processor).__name__
        way = "Choose another family, or pass the processor's own output to the model."
        if kind == "Blip2Processor":
            way = (
                f"Set processor.num_query_tokens to None and processor.chat_template to one that writes {processor.image_token!s} "
                f"{processor.num_query_tokens} times for each picture."
            )
        raise RenderError(
            f"processor must write pictures where the prompt has them; {kind} writes one picture's tokens before the whole prompt, so exemplars cannot have "
            f"pictures. {way}"
        )


def check_company(model_type: str, pictures: Sequence[Sequence[Image.Image]]) -> None:
    """Two families where a prompt's tokens or logits would depend on its neighbours in the batch.

    Raises:
        RenderError: such prompts stand together.
    """
    if model_type == "paligemma" and not all(pictures):
        raise RenderError(
            "episodes of paligemma must have pictures; got one without. Its processor cannot read words alone: render with pictures."
        )
    if model_type == "mllama" and len({len(few) for few in pictures}) > 1:
        raise RenderError(
            "episodes of mllama must have as many pictures each; got several numbers. Render them apart: tokens before the first picture "
            "attend to the padding pictures, so neighbours would change the logits."
        )


def check_canvas(model_type: str, pictures: Sequence[Sequence[Image.Image]], inputs: Mapping[str, Any]) -> None:
    """A family whose codes for a picture depend on the size of the batch's largest picture (it pads all to it, and normalises over the padding).

    Raises:
        PaddingError: prompts of one batch differ in that size; analyses go on with one at a time.
    """
    if model_type != "emu3" or not any(pictures):
        return
    sizes = iter(inputs["image_sizes"].tolist())
    canvases = {tuple(max(side) for side in zip(*(next(sizes) for _ in few), strict=True)) for few in pictures if few}
    if len(canvases) > 1:
        raise PaddingError(
            f"episodes of emu3 in one batch must have the same largest picture; got {sorted(canvases)} (height, width). Its codes depend on it: "
            "make all pictures the same size, or pass batch_size=1."
        )


def first_words(processor: Any) -> str:
    """What a processor writes before a prompt that does not begin with it, where its template does not (Molmo 2); "" for others."""
    if type(processor).__name__ != "Molmo2Processor":
        return ""
    return processor.tokenizer.bos_token or processor.tokenizer.eos_token or ""
