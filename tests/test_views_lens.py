"""Figures of reading out equal their data; patches stand over their pixels; text from data is never markup; what was not kept is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import views_samples as samples
from readout_cases import episodes, hooked

from mechicl.analysis.readout.direct_logits import direct_logits
from mechicl.analysis.readout.head_circuits import head_circuits
from mechicl.analysis.readout.logit_lens import logit_lens
from mechicl.errors import HeadIndexError, OptionError
from mechicl.results import HeadCircuits, LogitAttribution, LogitLens, PromptLens
from mechicl.views.lens_pictures import patch_table
from mechicl.views.logit_parts import head_table
from mechicl.views.plots import figure_json, plot

QUIET: dict[str, Any] = {"progress": False}
FAMILY = "qwen2_5_vl"


@pytest.fixture(scope="module")
def parts() -> LogitAttribution:
    return direct_logits(hooked(FAMILY), episodes(3), **QUIET)


@pytest.fixture(scope="module")
def lens() -> LogitLens:
    return logit_lens(hooked(FAMILY), episodes(3), prompt=0, n_null=100, **QUIET)


@pytest.fixture(scope="module")
def circuits() -> HeadCircuits:
    return head_circuits(hooked(FAMILY), [(1, 0), (1, 1)], episodes(3), prompt=0, n_random=10, **QUIET)


def trace(figure: Any, name: str) -> Any:
    return next(t for t in figure.data if t.name == name)


def hover(cells: Any) -> np.ndarray:
    return np.asarray(cells.customdata, dtype=float)


def test_the_attribution_grid_has_every_head_and_mlp_and_the_ranking_its_intervals_and_control(parts: LogitAttribution) -> None:
    figure = plot(parts, top=5)
    cells = trace(figure, "parts")
    index, table, rows, columns = head_table(parts)
    np.testing.assert_array_equal(cells.z, table)
    assert columns[-1] == "MLP"
    for layer, row in enumerate(rows):
        for k, column in enumerate(columns):
            name = f"mlp {row}" if column == "MLP" else f"{layer}.{column}"
            assert parts.components[index[layer, k]] == name
            assert table[layer, k] == parts.value[parts.components.index(name)]
    np.testing.assert_array_equal(hover(cells)[..., 2], np.where(index >= 0, parts.null[index], np.nan))
    best = [parts.components.index(name) for name in parts.top(5)]
    np.testing.assert_array_equal(trace(figure, "its part, 95 % interval").x, parts.value[best])
    np.testing.assert_array_equal(trace(figure, "the exemplars' labels permuted").x, parts.null[best])
    assert f"mean of {parts.n} episodes" in figure.to_dict()["layout"]["title"]["subtitle"]["text"]


def test_attribution_by_layer_and_by_span_show_their_arrays() -> None:
    layers = direct_logits(hooked(FAMILY), episodes(2), by="layer", control=False, **QUIET)
    figure = plot(layers)
    np.testing.assert_array_equal(figure.data[0].x, layers.value)
    assert len(figure.data) == 1  # without a control there is nothing to draw for it
    spans = direct_logits(hooked(FAMILY), episodes(2), by="span", **QUIET)
    cells = plot(spans, top=100).data[0]
    np.testing.assert_array_equal(cells.z, spans.value)
    assert tuple(cells.x) == spans.spans
    np.testing.assert_array_equal(hover(cells)[..., 0], spans.low)


@pytest.mark.parametrize("of", ["margin", "logprob", "rank"])
def test_the_lens_table_carries_interval_null_and_p(of: str) -> None:
    result = logit_lens(hooked(FAMILY), episodes(3), of=of, n_null=100, **QUIET)
    figure = plot(result)
    cells = trace(figure, "lens")
    np.testing.assert_array_equal(cells.z, result.value)
    for k, array in enumerate((result.low, result.high, result.null, result.null_low, result.null_high, result.p_corrected)):
        np.testing.assert_array_equal(hover(cells)[..., k], array)
    assert tuple(figure.to_dict()["layout"]["xaxis"]["ticktext"]) == result.spans
    last = result.spans.index("last token")
    np.testing.assert_array_equal(trace(figure, "last token, 95 % interval").x, result.value[:, last])


def test_dots_stand_on_the_significant_cells_and_nowhere_else(lens: LogitLens) -> None:
    p = np.ones_like(lens.p_corrected)
    p[1, 2] = 0.01
    dots = trace(plot(replace(lens, p_corrected=p)), "better than any candidate")
    assert [(round(y + 0.32), round(x - 0.38)) for x, y in zip(dots.x, dots.y, strict=True)] == [(1, 2)]
    assert len(trace(plot(replace(lens, p_corrected=np.ones_like(p))), "better than any candidate").x) == 0


def test_one_prompt_shows_its_margins_and_tokens(lens: LogitLens) -> None:
    assert lens.prompt is not None
    where = [0, 3, len(lens.prompt.view.tokens) - 1]
    cells = trace(plot(lens, show="tokens", positions=where), "tokens")
    np.testing.assert_array_equal(cells.z, lens.prompt.margin[:, where])
    every = plot(lens, show="tokens").data[0]
    assert np.asarray(every.z).shape[0] == len(lens.layers)
    with pytest.raises(OptionError, match="positions must be"):
        plot(lens, show="tokens", positions=[10_000])


def test_patches_on_the_pictures_are_the_prompts_margins(lens: LogitLens) -> None:
    assert lens.prompt is not None
    view, layer = lens.prompt.view, lens.layers[-1]
    figure = plot(lens, show="pictures", layers=[layer])
    drawn = [t for t in figure.data if t.type == "heatmap"]
    assert len(drawn) == len(view.images) == len(figure.to_dict()["layout"]["images"])
    seen = {}
    for cells in drawn:
        for token, value in zip(np.asarray(cells.customdata).ravel(), np.asarray(cells.z).ravel(), strict=True):
            seen[int(token)] = value
    for boxes in view.image_boxes:
        for position in boxes:
            assert seen[position] == lens.prompt.margin[-1, position]
    with pytest.raises(OptionError, match="layers must have been read"):
        plot(lens, show="pictures", layers=[99])


def test_a_patch_table_keeps_every_box_in_its_place_and_tiles_of_several_sizes_are_no_table() -> None:
    boxes = {7: (0.0, 0.0, 2.0, 3.0), 8: (2.0, 0.0, 4.0, 3.0), 9: (0.0, 3.0, 2.0, 6.0), 10: (2.0, 3.0, 4.0, 6.0)}
    table = patch_table(boxes, np.arange(12.0))
    assert table is not None
    across, down, values, tokens = table
    assert (across, down) == ([0, 2, 4], [0, 3, 6])
    np.testing.assert_array_equal(values, [[7, 8], [9, 10]])
    np.testing.assert_array_equal(tokens, [[7, 8], [9, 10]])
    assert patch_table({1: (0.0, 0.0, 4.0, 4.0), 2: (1.0, 1.0, 2.0, 2.0), 3: (3.0, 1.0, 4.0, 2.0)}, np.arange(4.0)) is None


def test_head_circuits_show_copying_scores_with_their_null_and_each_heads_table(circuits: HeadCircuits) -> None:
    assert circuits.copying is not None
    assert circuits.label_copying is not None
    figure = plot(circuits)
    points = trace(figure, f"over {circuits.copying.tokens:,} tokens")
    np.testing.assert_array_equal(points.x, circuits.copying.value)
    bars = trace(figure, "random matrices, 95 %")
    np.testing.assert_allclose(np.asarray(bars.base, dtype=float) + np.asarray(bars.x, dtype=float), circuits.copying.null_high)
    np.testing.assert_array_equal(trace(figure, f"over the {circuits.label_copying.tokens} label tokens").x, circuits.label_copying.value)
    match = circuits.matches[1, 1]
    for figure in (plot(circuits, head=(1, 1)), plot(match)):
        cells = trace(figure, "match")
        np.testing.assert_array_equal(cells.z, match.value)
        for k, array in enumerate((match.low, match.high, match.null_low, match.null_high)):
            np.testing.assert_array_equal(hover(cells)[..., k], array)
    with pytest.raises(HeadIndexError, match="must be one"):
        plot(circuits, head=(0, 0))


def test_scores_on_pictures_are_taken_from_their_mean(circuits: HeadCircuits) -> None:
    assert circuits.scores is not None
    assert circuits.view is not None
    figure = plot(circuits, head=(1, 0), pictures=True)
    boxes = circuits.view.image_boxes
    tokens = sorted(p for one in boxes for p in one)
    row = circuits.scores[1, 0][0]
    first = next(t for t in figure.data if t.type == "heatmap")
    table = patch_table(boxes[0], row - row[tokens].mean())
    assert table is not None
    np.testing.assert_allclose(np.asarray(first.z), table[2])
    with pytest.raises(OptionError, match="made with a prompt"):
        plot(replace(circuits, scores=None), pictures=True)


def test_what_was_not_kept_is_refused(lens: LogitLens, circuits: HeadCircuits) -> None:
    with pytest.raises(OptionError, match="prompt=0"):
        plot(replace(lens, prompt=None), show="tokens")
    with pytest.raises(OptionError, match="show must be"):
        plot(lens, show="film")
    assert plot(replace(circuits, copying=None)).data[0].name == "match"
    assert lens.prompt is not None
    blind = replace(lens.prompt, view=replace(lens.prompt.view, images=(), image_boxes=()))
    with pytest.raises(OptionError, match="pictures with known patches"):
        plot(replace(lens, prompt=blind), show="pictures")


def test_text_from_data_is_never_markup_and_the_same_result_gives_the_same_bytes(lens: LogitLens) -> None:
    assert lens.prompt is not None
    view = samples.hostile_prompt()
    n = len(view.tokens)
    bad = "<img src=x onerror=alert(1)>"
    hostile = PromptLens(view, np.ones((len(lens.layers), n)), tuple(((bad,),) * n for _ in lens.layers), np.ones((len(lens.layers), n, 1)))
    for show in ("tokens", "pictures"):
        figure = plot(replace(lens, prompt=hostile), show=show)
        text = str(figure.to_dict())
        assert "<img" not in text
        assert "<script" not in text
        assert plot(replace(lens, prompt=hostile), show=show).to_json() == figure.to_json()
    assert figure_json(plot(lens))["data"] == figure_json(plot(lens, dark=True))["data"]
