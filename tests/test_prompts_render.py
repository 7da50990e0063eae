"""Episodes -> tokens with exact roles, in every family."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mechicl.errors import ContextLengthError, EpisodeError, ImageError, RenderError
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode, Shot, check_episodes, check_pictures
from mechicl.prompts.render import Renderer
from mechicl.prompts.spans import QUERY
from mechicl.training.organisms import build

Organism = Callable[..., tuple[Any, Any]]


def picture(width: int = 56, height: int = 56, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def episode(
    instruction: str = "Answer with a single word, e.g. dax.",
    *,
    sizes: tuple[tuple[int, int], ...] = ((56, 56), (90, 60), (60, 84), (56, 112)),
) -> Episode:
    """Nested labels ("dax", "daxo"), one of them in the instruction and in the question, repeated, one shot with two pictures and words."""
    a, b, c, d = (picture(*size, seed=k) for k, size in enumerate(sizes))
    shots = (
        Shot("dax", (a,), item="x"),
        Shot("daxo", (b,), item="y"),
        Shot("kimo tepa", (c, picture(70, 50, 9)), text="two things", item="z"),
        Shot("dax", (b,), item="x"),
    )
    return Episode(shots, Shot("daxo", (d,), item="y"), ("dax", "daxo", "kimo tepa"), instruction, "Is this a dax?", id="nested")


def text_of(renderer: Renderer, batch: Batch, row: int, span: Any) -> str:
    return renderer.tokenizer.decode(batch.inputs["input_ids"][row, span.start : span.stop].tolist())


def spans_of(batch: Batch, row: int, role: str) -> list[Any]:
    return [span for span in batch.spans[row] if span.role == role]


def test_every_position_has_one_role_and_every_piece_its_own_words(family: str, organism: Organism) -> None:
    model, processor = organism(family)
    renderer = Renderer(processor, model.config)
    short = episode("") if family == "mllama" else episode("").without_shots()  # mllama: as many pictures in each
    batch = renderer.render([episode(), short, episode("")])
    for row, e in enumerate(batch.episodes):
        spans = batch.spans[row]
        assert [s.start for s in spans] == [0, *[s.stop for s in spans[:-1]]]
        assert spans[-1].stop == batch.n_pos
        labels = spans_of(batch, row, "label")
        assert [(s.shot, s.label, s.item) for s in labels] == [(k, shot.label, shot.item) for k, shot in enumerate(e.shots)]
        assert [text_of(renderer, batch, row, s).strip() for s in labels] == [shot.label for shot in e.shots]
        questions = spans_of(batch, row, "question")
        assert [(s.shot, text_of(renderer, batch, row, s).strip()) for s in questions] == [
            (k, e.question) for k in (*range(len(e.shots)), QUERY)
        ]
        assert [text_of(renderer, batch, row, s).strip() for s in spans_of(batch, row, "instruction")] == [e.instruction] * bool(
            e.instruction
        )
        assert [text_of(renderer, batch, row, s).strip() for s in spans_of(batch, row, "text")] == ["two things"] * bool(e.shots)
        owners = {s.image: (s.shot, s.label) for s in spans_of(batch, row, "image")}
        expected = [(k, shot.label) for k, shot in enumerate(e.shots) for _ in shot.images] + [(QUERY, e.answer)]
        assert [owners[k] for k in range(len(expected))] == expected
    ids = batch.inputs["input_ids"]
    assert torch.equal(batch.mask("image"), ids == renderer.image_token_id)
    assert torch.equal(~batch.mask("pad"), batch.inputs["attention_mask"].bool())
    assert batch.query_pos.tolist() == [batch.n_pos - 1] * 3
    assert batch.token_roles()[0].count("image") == int(batch.mask("image")[0].sum())


def test_candidates_follow_the_prompt_as_labels_follow_in_the_exemplars(family: str, organism: Organism) -> None:
    model, processor = organism(family)
    batch = Renderer(processor, model.config).render([episode()])
    for span in spans_of(batch, 0, "label"):
        which = batch.candidates[0].index(span.label)
        assert tuple(batch.inputs["input_ids"][0, span.start : span.stop].tolist()) == batch.candidate_ids[0][which]


def test_the_model_takes_what_comes_out_and_left_padding_changes_nothing(family: str, organism: Organism) -> None:
    model, processor = organism(family)
    renderer = Renderer(processor, model.config)
    short = episode("") if family == "mllama" else episode("").without_shots()  # mllama: as many pictures in each
    both, alone = renderer.render([episode(), short]), renderer.render([short])
    with torch.no_grad():
        padded, bare = model(**both.inputs).logits[1, -1], model(**alone.inputs).logits[0, -1]
    assert both.n_pos > alone.n_pos
    assert torch.allclose(padded, bare, atol=2e-4 * float(bare.std()) + 1e-5)  # float32, sums in another order
    assert [s.shift(both.n_pos - alone.n_pos) for s in alone.spans[0]] == list(both.spans[1][1:])
    assert [{p + both.n_pos - alone.n_pos: box for p, box in m.items()} for m in alone.patches[0]] == list(both.patches[1])


def test_the_tokens_are_those_of_the_processor_own_chat_template(family: str, organism: Organism) -> None:
    model, processor = organism(family)
    one = picture(), picture(90, 60, 1)
    plain = Episode((Shot("dax", (one[0],)),), Shot("kimo", (one[1],)), ("dax", "kimo"), question="What is this?")
    batch = Renderer(processor, model.config).render([plain])
    turns = []
    for image, answer in zip(one, ("dax", None), strict=True):
        turns.append({"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]})
        if answer:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    if processor.chat_template is None:  # a family of plain lines: each piece on a line of its own, a question directly behind its picture
        lines = "<image>What is this?\ndax\n<image>What is this?"
        theirs = dict(processor(text=[lines], images=[list(one)], return_tensors="pt"))
        theirs.pop("labels", None)  # a training target, not an input
    else:
        theirs = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    assert batch.inputs["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert set(theirs) == set(batch.inputs)
    for name, value in theirs.items():
        assert torch.equal(value, batch.inputs[name]), name


WORD = (
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zl", "Zp", "Co")), min_size=1, max_size=8)
    .map(str.strip)
    .filter(bool)
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(labels=st.lists(WORD, min_size=2, max_size=4, unique=True), order=st.lists(st.integers(0, 3), min_size=1, max_size=5), extra=WORD)
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava", "gemma3"])
def test_roles_are_exact_for_any_words(kind: str, organism: Organism, labels: list[str], order: list[int], extra: str) -> None:
    model, processor = organism(kind)
    renderer = Renderer(processor, model.config)
    names = [labels[k % len(labels)] for k in order]
    shots = tuple(Shot(name, text=f"{labels[0]} {extra}") for name in names)
    one = Episode(shots, Shot(labels[0], text=extra), tuple(labels), f"{labels[1]} {extra} {labels[0]}", f"{labels[0]}?")
    if any(token in text for token in renderer.special for text in (*labels, extra)):  # refused, not guessed; anything else must render
        with pytest.raises(RenderError, match="control token"):
            renderer.render([one])
        return
    batch = renderer.render([one])
    found = [span for span in batch.spans[0] if span.role == "label"]
    assert [text_of(renderer, batch, 0, span).strip() for span in found] == names
    assert [span.shot for span in found] == list(range(len(names)))
    assert text_of(renderer, batch, 0, spans_of(batch, 0, "instruction")[0]).strip() == one.instruction
    for label, ids in zip(batch.candidates[0], batch.candidate_ids[0], strict=True):
        assert renderer.tokenizer.decode(list(ids)).strip() == label
    for span in found:  # a space before the answer may be a token of its own; it belongs to the continuation, not to the label
        whole = batch.candidate_ids[0][labels.index(span.label)]
        mine = tuple(batch.inputs["input_ids"][0, span.start : span.stop].tolist())
        assert mine == whole[len(whole) - len(mine) :]
        assert not renderer.tokenizer.decode(list(whole[: len(whole) - len(mine)])).strip()


def test_a_mixed_batch_of_words_and_pictures_renders(family: str, organism: Organism) -> None:
    model, processor = organism(family)
    words = Episode((Shot("dax", text="red"), Shot("kimo", text="blue")), Shot("dax", text="red"), ("dax", "kimo"), "Answer.", "Name?")
    renderer = Renderer(processor, model.config)
    if family in ("mllama", "paligemma", "paligemma2"):
        with pytest.raises(RenderError, match=r"must have (pictures|as many pictures each)"):
            renderer.render([episode(), words])
        return
    batch = renderer.render([episode(), words])
    assert int(batch.mask("image")[1].sum()) == 0
    with torch.no_grad():
        assert torch.isfinite(model(**batch.inputs).logits).all()


def test_words_alone_render_where_the_family_allows(family: str, organism: Organism) -> None:
    model, processor = organism(family)
    words = Episode((Shot("dax", text="red"), Shot("kimo", text="blue")), Shot("dax", text="red"), ("dax", "kimo"), "Answer.", "Name?")
    renderer = Renderer(processor, model.config)
    if family.startswith("paligemma"):
        with pytest.raises(RenderError, match="pictures"):
            renderer.render([words])
        return
    assert renderer.render([words]).candidate_ids[0][0]


def metaspace_tokenizer(style: str) -> Any:
    """A tokenizer of the SentencePiece kind: words begin with a mark, which the first word of a text (or of every stretch) gets too."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*specials, *[f"<0x{k:02X}>" for k in range(256)]])
    backend.train_from_iterator(["USER: is this a dax? ASSISTANT: daxo kimo tepa answer with a single word"] * 9, trainer)
    if style in ("llama", "gemma"):
        backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")  # nothing else is split: the merges never cross a word
        prepend = [normalizers.Prepend("▁")] if style == "llama" else []
        backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=style)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=["<image>"]
    )


@pytest.mark.parametrize("style", ["llama", "gemma", "first", "always", "never"])
def test_roles_are_exact_with_tokenizers_that_mark_words(style: str) -> None:
    built: tuple[Any, Any] = build("llava")
    model, processor = built
    processor.tokenizer = metaspace_tokenizer(style)
    processor.image_token, processor.image_token_id = "<image>", processor.tokenizer.convert_tokens_to_ids("<image>")
    model.config.image_token_index = model.config.image_token_id = processor.image_token_id
    renderer = Renderer(processor, model.config)
    words = Episode(
        (Shot("dax", text="red"), Shot("daxo", text="blue 🦄")), Shot("dax", text="red"), ("dax", "daxo"), "A dax.", "is this a dax?"
    )
    for one in (episode(), words):
        batch = renderer.render([one])
        labels = spans_of(batch, 0, "label")
        assert [text_of(renderer, batch, 0, s).strip() for s in labels] == [shot.label for shot in one.shots]
        for span in labels:
            same = batch.candidate_ids[0][batch.candidates[0].index(span.label)]
            assert tuple(batch.inputs["input_ids"][0, span.start : span.stop].tolist()) == same


def test_trimmed_offsets_keep_the_roles() -> None:
    """GPT-2's kind of tokenizer leaves spaces out of its offsets."""
    from tokenizers import processors

    model, processor = build("smolvlm")
    processor.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    renderer = Renderer(processor, model.config)
    batch = renderer.render([episode("Two\n\nlines.")])
    assert [text_of(renderer, batch, 0, s).strip() for s in spans_of(batch, 0, "label")] == ["dax", "daxo", "kimo tepa", "dax"]
    assert text_of(renderer, batch, 0, spans_of(batch, 0, "instruction")[0]).strip() == "Two\n\nlines."


# refusals


@pytest.fixture(scope="module")
def qwen() -> tuple[Any, Any]:
    return build("qwen2_5_vl")


def pair(label: str = "dax", **more: Any) -> Episode:
    return Episode((Shot(label, (picture(),)), Shot("kimo", (picture(),))), Shot("kimo", (picture(),)), (label, "kimo"), id="e7", **more)


def test_control_tokens_in_texts_are_refused(qwen: Any) -> None:
    model, processor = qwen
    renderer = Renderer(processor, model.config)
    with pytest.raises(RenderError, match=r"episode e7: label of shot 0 must not contain the control token '<\|im_end\|>'"):
        renderer.render([pair("a<|im_end|>b")])
    with pytest.raises(RenderError, match="question must not contain"):
        renderer.render([pair(question=f"What is {processor.image_token}?")])
    with pytest.raises(RenderError, match="private-use"):
        renderer.render([pair("a\U000f0001b")])


def test_a_prompt_beyond_the_context_is_refused_with_both_lengths(qwen: Any) -> None:
    model, processor = qwen
    length = Renderer(processor, model.config).render([pair()]).n_pos
    longest = 2
    assert Renderer(processor, model.config, context=length + longest).render([pair()]).n_pos == length
    with pytest.raises(ContextLengthError, match=rf"episode e7: .*context of {length} tokens; got {length + longest} \({length} without"):
        Renderer(processor, model.config, context=length).render([pair()])


def test_bad_pictures_are_refused(qwen: Any) -> None:
    model, processor = qwen
    renderer = Renderer(processor, model.config)
    whole = io.BytesIO()
    picture(200, 200).save(whole, "JPEG")
    torn = Image.open(io.BytesIO(whole.getvalue()[:3000]))
    for bad, match in (
        (torn, "readable"),
        (Image.new("RGB", (0, 5)), "must have pixels"),
        (Image.new("RGB", (3, 900)), "times as long as wide"),
    ):
        with pytest.raises(ImageError, match=match):
            renderer.render([Episode((Shot("dax", (picture(),)),), Shot("kimo", (bad,)), ("dax", "kimo"), id="e7")])


def test_pictures_of_any_mode_are_read_upright_as_rgb(qwen: Any) -> None:
    model, processor = qwen
    renderer = Renderer(processor, model.config)
    clear = Image.new("RGBA", (56, 56), (0, 0, 0, 0))
    white = Image.new("RGB", (56, 56), "white")
    for mode in ("L", "P", "CMYK", "1", "I;16"):
        renderer.render([Episode((Shot("dax", (picture(),)),), Shot("kimo", (Image.new(mode, (60, 56)),)), ("dax", "kimo"))])
    a, b = (renderer.render([Episode((), Shot("kimo", (image,)), ("dax", "kimo"))]).inputs["pixel_values"] for image in (clear, white))
    assert torch.equal(a, b)


def test_candidates_that_the_tokenizer_cannot_tell_apart_are_refused() -> None:
    from tokenizers import normalizers

    model, processor = build("qwen2_5_vl")
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(RenderError, match="candidates must differ in tokens; 'Kimo' and 'kimo'"):
        Renderer(processor, model.config).render([pair("Kimo")])


CHAT = "{% for m in messages %}{{ m['role'] }}:{% for p in m['content'] %}{% if p['type'] == 'image' %}IMG{% else %}{{ p['text'] }}{% endif %}{% endfor %}\n{% endfor %}"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("{{ p['text'] }}", "{{ p['text'] | upper }}"), "must write the (question|label) as it is"),
        (("{{ p['text'] }}", "{{ p['text'] }}{{ p['text'] }}"), "must write every piece once|user turns"),
        (("{{ p['text'] }}", "{{ p['text'] }}{{ p['text'] | length }}"), "must not look at the text"),
        (("IMG", ""), "one <|image_pad|> per picture"),
    ],
)
def test_templates_that_hide_or_change_the_text_are_refused(qwen: Any, change: tuple[str, str], match: str) -> None:
    model, processor = qwen
    template = CHAT.replace(*change).replace("IMG", processor.image_token)
    with pytest.raises(RenderError, match=match.replace("|image_pad|", r"\|image_pad\|")):
        Renderer(processor, model.config, chat_template=template).render([pair(question="what?")])


def test_another_template_can_be_given(qwen: Any) -> None:
    model, processor = qwen
    batch = Renderer(processor, model.config, chat_template=CHAT.replace("IMG", processor.image_token)).render(
        [pair(question="what?", instruction="Say.")]
    )
    assert [s.shot for s in batch.spans[0] if s.role == "label"] == [0, 1]
    assert spans_of(batch, 0, "instruction")


def test_a_prompt_that_ends_in_a_space_which_the_answer_swallows_is_refused() -> None:
    built: tuple[Any, Any] = build("llava")
    model, processor = built
    processor.tokenizer = metaspace_tokenizer("gemma")
    model.config.image_token_index = processor.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    template = "{% for m in messages %}{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %} {% endfor %}ASSISTANT: "
    with pytest.raises(RenderError, match="prompt's tokens must stay the same"):
        Renderer(processor, model.config, chat_template=template).render([pair()])


def test_a_tokenizer_that_closes_the_prompt_is_refused() -> None:
    from tokenizers import processors

    model, processor = build("qwen2_5_vl")
    end = processor.tokenizer.eos_token
    processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A $B {end}", special_tokens=[(end, processor.tokenizer.eos_token_id)]
    )
    with pytest.raises(RenderError, match="must end where the answer begins"):
        Renderer(processor, model.config).render([pair()])


def test_what_is_no_vision_language_processor_is_refused(qwen: Any) -> None:
    model, processor = qwen
    with pytest.raises(RenderError, match="image token"):
        Renderer(processor, model.config.get_text_config())
    with pytest.raises(RenderError, match="gives offsets"):
        Renderer(object(), model.config)
    with pytest.raises(RenderError, match="non-empty"):
        Renderer(processor, model.config).render([])


def test_episodes_that_ask_nothing_are_refused() -> None:
    one = Shot("dax", (picture(),))
    with pytest.raises(EpisodeError, match="must be a candidate"):
        Episode((one,), Shot("kimo", (picture(),)), ("dax", "tepa"))
    with pytest.raises(EpisodeError, match="at least two"):
        Episode((one,), one, ("dax",))
    with pytest.raises(EpisodeError, match="distinct"):
        Episode((one,), one, ("dax", "dax"))
    with pytest.raises(EpisodeError, match="picture or a text"):
        Shot("dax")
    with pytest.raises(EpisodeError, match="non-empty string"):
        Shot(" ", text="x")
    try:
        jaxtyping.config.update("jaxtyping_disable", True)  # as a user runs it: the annotations are not checked
        with pytest.raises(ImageError, match="PIL"):
            Shot("dax", ("cat.png",))  # pyright: ignore[reportArgumentType]
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    with pytest.raises(EpisodeError, match="only 'dax'"):
        check_episodes([Episode((one, one), one, ("dax", "kimo"))])
    with pytest.raises(EpisodeError, match="must not be empty"):
        check_episodes([Episode((), one, ("dax", "kimo"))])
    with pytest.raises(EpisodeError, match="non-empty list"):
        check_episodes([])
    words = (Shot("dax", text="a"), Shot("kimo", text="b"))
    with pytest.raises(ImageError, match="at least one picture"):
        check_episodes([Episode(words, words[0], ("dax", "kimo"))])
    check_episodes([Episode(words, words[0], ("dax", "kimo"))], images=False)


def test_a_damaged_picture_anywhere_in_the_list_is_an_error_before_any_work(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])

    def episode(name: str, file: str) -> Episode:
        shots = tuple(Shot(label, (Image.open(tmp_path / "whole.png"),), item=label) for label in ("zuda", "mipo"))
        return Episode(shots, Shot("zuda", (Image.open(tmp_path / file),), item="zuda"), ("zuda", "mipo"), id=name)

    whole = [episode("a", "whole.png"), episode("b", "whole.png")]
    check_pictures(whole)
    assert all(image.tile for one in whole for image in one.images)  # still only opened: nothing stays in memory
    with pytest.raises(ImageError, match=r"episode b: picture 2 must be readable; got .*cut.png"):
        check_pictures(damaged := [whole[0], episode("b", "cut.png"), whole[1]])
    for image in (image for one in (*whole, *damaged) for image in one.images):
        image.close()
