"""Figures of key-value shift, factors, margins and strategies equal their data, mark only what passes, keep controls beside, and escape every word."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import views_samples_kv as samples

from mechicl.errors import OptionError
from mechicl.results import Estimate
from mechicl.views import panels, theme
from mechicl.views.plots import figure_json, plot


def maps(figure: Any) -> list[Any]:
    return [t for t in figure.data if t.type == "heatmap"]


def named(figure: Any, name: str) -> Any:
    return next(t for t in figure.data if t.name == name)


@pytest.mark.parametrize("kind", samples.EVERY)
def test_every_result_has_a_figure_that_is_the_same_bytes_every_time(kind: str) -> None:
    make = samples.EVERY[kind]
    figure = plot(make())
    assert figure.to_json() == plot(make()).to_json()
    assert figure.layout.title.text
    assert figure.layout.height >= 250
    dark = plot(make(), dark=True)
    assert len(dark.data) == len(figure.data)
    assert dark.layout.template.layout.font.color != figure.layout.template.layout.font.color


@pytest.mark.parametrize("kind", ["shift", "similarity", "margin"])
def test_every_colour_axis_has_its_dark_scale(kind: str) -> None:
    light, dark = plot(samples.EVERY[kind]()), plot(samples.EVERY[kind](), dark=True)
    scales = {"sequential": (theme.SEQUENTIAL, theme.SEQUENTIAL_DARK), "diverging": (theme.DIVERGING, theme.DIVERGING_DARK)}
    axes = [key for key in figure_json(light)["layout"] if key.startswith("coloraxis")]
    assert len(axes) == (8 if kind == "margin" else 1)
    for axis in axes:
        for figure, want in zip((light, dark), scales[light.layout.meta["scale"]], strict=True):
            assert [list(c) for c in figure.layout[axis].colorscale] == want


@pytest.mark.parametrize("measure", ["relative_l2", "cosine_distance", "cka"])
def test_shift_maps_hold_the_values_against_each_control(measure: str) -> None:
    result = samples.shift()
    found = maps(plot(result, measure=measure))
    each = 3 if measure == "relative_l2" else 2
    assert len(found) == 2 * each
    for p in range(2):
        for cells, one in zip(found[each * p :], (result, result.others["zero-shot"]), strict=False):
            np.testing.assert_array_equal(cells.z, one.measures[measure][p].reshape(8, 3))
            np.testing.assert_array_equal(np.asarray(cells.customdata)[..., 0], one.low[measure][p].reshape(8, 3))
            np.testing.assert_array_equal(np.asarray(cells.customdata)[..., 1], one.high[measure][p].reshape(8, 3))
            assert f"n = {samples.N}" in cells.hovertemplate
    if measure == "relative_l2":
        assert result.test is not None
        np.testing.assert_array_equal(found[2].z, result.test.filler[0].reshape(8, 3))
        np.testing.assert_array_equal(np.asarray(found[5].customdata)[..., 1], result.test.difference[1].reshape(8, 3))


def test_dots_mark_where_examples_do_more_than_filler_and_nowhere_else() -> None:
    result = samples.shift()
    assert result.test is not None
    dots = [t for t in plot(result).data if t.name == "corrected p < 0.05"]
    assert [len(t.x) for t in plot(result).data if t.name == "less, corrected p < 0.05"] == [0, 0]
    assert len(dots) == 2  # beside the maps against zero-shot only
    for p, mark in enumerate(dots):
        drawn = {(round(y + 0.3), round(x - 0.38)) for x, y in zip(mark.x, mark.y, strict=True)}
        assert drawn == {tuple(c) for c in np.argwhere(result.test.p_corrected[p].reshape(8, 3) < 0.05).tolist()}
    assert not [t for t in plot(samples.shift_alone()).data if t.name == "corrected p < 0.05"]


def test_examples_that_do_less_than_filler_are_marked_as_less() -> None:
    result = samples.shift()
    assert result.test is not None
    turned = replace(result, test=replace(result.test, difference=-result.test.difference))
    figure = plot(turned)
    less = [t for t in figure.data if t.name == "less, corrected p < 0.05"]
    assert [len(t.x) for t in less] == [len(t.x) for t in plot(result).data if t.name == "corrected p < 0.05"]
    assert not any(len(t.x) for t in figure.data if t.name == "corrected p < 0.05")
    assert less[0].marker.symbol == "triangle-down"


def test_pooled_shifts_stand_beside_both_controls_with_their_intervals() -> None:
    result = samples.shift()
    figure = plot(result)
    for name, pooled in (("examples against filler", result.pooled), ("examples against zero-shot", result.others["zero-shot"].pooled)):
        rows = named(figure, name)
        np.testing.assert_array_equal(rows.x, [e.value for e in pooled.values()])
        np.testing.assert_allclose(np.asarray(rows.x) + rows.error_x.array, [e.high for e in pooled.values()])
    assert result.test is not None
    test = named(figure, "examples minus filler, both from zero-shot")
    hollow = [c == "rgba(0,0,0,0)" for c in test.marker.color]
    assert hollow == [p >= 0.05 for p in result.test.pooled_p.values()]
    with pytest.raises(OptionError, match="measure must be one of"):
        plot(result, measure="manhattan")


def test_large_models_get_thin_rows_and_no_numbers() -> None:
    small, large = plot(samples.shift()), plot(samples.shift(layers=32, heads=8))
    assert maps(small)[0].texttemplate
    assert maps(large)[0].texttemplate is None
    assert large.layout.height < 2200
    assert len(large.layout.yaxis.tickvals) <= panels.FITS


def test_effects_of_similar_examples_stand_beside_both_controls_filled_where_they_pass() -> None:
    result = samples.similarity()
    figure = plot(result)
    found = maps(figure)
    for k, one in enumerate((result, result.others["zero-shot"])):
        rows = named(figure, f"shift from {one.control}")
        np.testing.assert_array_equal(rows.x, [c.effect.value for c in one.comparisons])
        assert [c != "rgba(0,0,0,0)" for c in rows.marker.color] == [c.p_corrected < 0.05 for c in one.comparisons]
        for p, cells in enumerate(found[2 * k : 2 * k + 2]):
            np.testing.assert_array_equal(cells.z, one.effect[p].reshape(8, 3))
    less = [len(t.x) for t in figure.data if t.name == "less, corrected p < 0.05"]
    assert less[0] < less[2]  # less is marked where it is less
    assert figure.layout.coloraxis.cmid == 0
    assert len(maps(plot(samples.similarity(both=False)))) == 2


def test_the_plane_puts_meaning_across_and_form_up_a_marker_per_layer() -> None:
    result = samples.shares()
    figure = plot(result)
    layers = [t for t in figure.data if t.name.startswith("layer")]
    assert len(layers) == 4 * 2 * 2  # layers, parts, two spans
    first = layers[0]
    span = result.spans.index("last token")
    np.testing.assert_array_equal(first.x, result["semantics"][0, 0, :, span])
    np.testing.assert_array_equal(first.y, result["format"][0, 0, :, span])
    np.testing.assert_allclose(np.asarray(first.x) + first.error_x.array, result.high["semantics"][0, 0, :, span])
    assert len({t.marker.symbol for t in layers}) == 4  # not by colour alone
    for t in layers:
        assert all(x + y <= 1 + 1e-9 for x, y in zip(t.x, t.y, strict=True))
    one = plot(result, spans=["query question"])
    np.testing.assert_array_equal(one.data[0].x, result["semantics"][0, 0, :, 1])
    with pytest.raises(OptionError, match="spans must be some of"):
        plot(result, spans=["moon"])
    with pytest.raises(OptionError, match="show must be"):
        plot(result, show="all")
    still = replace(result, shares={s: np.where(np.arange(4)[None, :, None, None] == 0, np.nan, v) for s, v in result.shares.items()})
    assert [t.name for t in plot(still).data if t.showlegend][:3] == ["layer 1", "layer 2", "layer 3"]  # the first layer never moves
    with pytest.raises(OptionError, match="factors must be at least two"):
        plot(replace(result, factors=("semantics",)))


def test_layers_beyond_the_markers_are_counted_by_colour() -> None:
    figure = plot(samples.shares(layers=24))
    first = [t for t in figure.data if t.name.startswith("layer")]
    assert list(first[5].marker.color) == [5, 5]
    assert first[0].error_x.array is None
    assert figure.layout.coloraxis.cmax == 23


@pytest.mark.parametrize("residual", [True, False])
def test_share_maps_hold_every_source_and_sum_to_one(residual: bool) -> None:
    result = samples.shares(residual=residual)
    found = maps(plot(result, show="shares"))
    assert len(found) == 2 * len(result.sources)
    for p in range(2):
        mine = found[p * len(result.sources) : (p + 1) * len(result.sources)]
        np.testing.assert_allclose(sum(np.asarray(cells.z) for cells in mine), 1)
        for cells, source in zip(mine, result.sources, strict=True):
            np.testing.assert_array_equal(cells.z, result[source][p].reshape(8, 3))


def test_conditions_stand_with_answers_beside_shares() -> None:
    result = samples.shares()
    figure = plot(result, show="answers")
    np.testing.assert_array_equal(named(figure, "accuracy").x, [result.accuracy[c].value for c in result.conditions])
    np.testing.assert_array_equal(named(figure, "margin").x, [result.margin[c].value for c in result.conditions])
    np.testing.assert_array_equal(named(figure, "values").x, [result.pooled["v"][s].value for s in result.sources])
    assert figure.layout.shapes[0].x0 == result.chance


def test_the_condition_table_shows_tasks_costs_shares_and_the_trend() -> None:
    table = samples.table()
    figure = plot(table)
    np.testing.assert_array_equal(named(figure, "accuracy").x, [row.accuracy.value for row in table.rows])
    trend = named(figure, "trend")
    np.testing.assert_array_equal(trend.x, [e.value for e in table.trend.values()])
    assert list(trend.y) == ["share of keys: supported", "share of values: undecided", "accuracy lost: contradicted"]
    assert table.verdict in figure.layout.title.subtitle.text


def test_a_fit_that_did_not_converge_says_so_first() -> None:
    assert plot(samples.mixed(converged=False)).layout.title.subtitle.text.startswith("<b>did not converge")
    good = plot(samples.mixed())
    assert "converge" not in good.layout.title.subtitle.text
    rows = named(good, "fixed effect")
    np.testing.assert_array_equal(rows.x, [e.value for e in samples.mixed().fixed.values()])
    assert [c == "rgba(0,0,0,0)" for c in rows.marker.color] == [False, False, True, False]


def test_margins_stand_above_their_areas_and_the_best_heads_beside_baselines() -> None:
    result = samples.margin()
    figure = plot(result)
    found = maps(figure)
    for cells, part in zip(found, result.parts.values(), strict=False):
        np.testing.assert_array_equal(cells.z, part.value)
    for cells, part in zip(found[4:], result.parts.values(), strict=True):
        np.testing.assert_array_equal(cells.z, part.auroc)
    for k in range(5, 9):
        assert figure.layout[f"coloraxis{k}"].cmid == 0.5
    held = [named(figure, name) for name in ("keys, best head", "values, best head", "match q \u00b7 k, best head", "attention, best head")]
    np.testing.assert_array_equal([row.x[0] for row in held], [part.held_out.value for part in result.parts.values()])
    np.testing.assert_array_equal(named(figure, "baseline").x, [result.confidence_auroc.value, result.output_auroc.value])
    right, wrong = named(figure, "right answers"), named(figure, "wrong answers")
    assert right.marker.symbol != wrong.marker.symbol
    np.testing.assert_array_equal(right.y, result.output[result.correct])
    np.testing.assert_array_equal(wrong.x, result["qk"].per_episode[~result.correct, 1, 2])


def test_without_wrong_answers_margins_are_held_against_the_answers_margin() -> None:
    result = samples.margin(known=False)
    figure = plot(result)
    assert "no AUROC: all answers are right" in figure.layout.title.subtitle.text
    np.testing.assert_array_equal(maps(figure)[4].z, result["k"].rho)
    assert not [t for t in figure.data if t.name == "baseline"]


def test_the_dose_curve_stands_over_the_band_of_random_directions() -> None:
    result = samples.pushed()
    figure = plot(result)
    along = named(figure, "along the margin")
    np.testing.assert_array_equal(along.y, result.change)
    np.testing.assert_array_equal(np.asarray(along.y) + along.error_y.array, result.high)
    np.testing.assert_array_equal(named(figure, "random high").y, result.control_high)
    np.testing.assert_array_equal(named(figure, "random directions, 95 % (8 each)").y, result.control_low)
    np.testing.assert_array_equal(named(figure, "accuracy").y, result.accuracy)


def test_a_learned_map_is_judged_on_held_out_episodes_beside_its_controls() -> None:
    result = samples.learned()
    figure = plot(result)
    assert named(figure, "with the map").x[0] == result.score.value
    assert named(figure, "map of shuffled labels").x[0] == result.shuffled.value
    np.testing.assert_array_equal(named(figure, "validation loss").y, result.curve)
    bare = plot(replace(result, auroc=None, plain_auroc=None))
    assert not [t for t in bare.data if "AUROC" in (t.name or "")]


def test_strategies_stand_with_paired_differences_from_the_baseline() -> None:
    result = samples.strategies()
    figure = plot(result)
    rows = [t for t in figure.data if t.name == "model"]
    model = [row for row in result.rows if row.kind == "model"]
    for trace, key in zip(rows, ("accuracy", "auroc", "f1"), strict=False):
        np.testing.assert_array_equal(trace.x, [getattr(row, key).value for row in model])
    np.testing.assert_array_equal(rows[3].x, [row.accuracy_change.value for row in model if row.accuracy_change])
    assert [c != "rgba(0,0,0,0)" for c in rows[0].marker.color] == [False, False, False, True]
    assert figure.layout.shapes[0].x0 == result.chance
    alone = plot(replace(result, rows=result.rows[:1]))
    assert len(alone.data) == 3


def test_numbers_that_are_missing_draw_nothing_and_break_nothing() -> None:
    blank = samples.shares()
    nothing = {s: np.full_like(v, np.nan) for s, v in blank.shares.items()}
    figure_json(plot(replace(blank, shares=nothing, low=nothing, high=nothing, null={s: nothing[s] for s in blank.null})))
    shift = samples.shift_alone()
    figure_json(plot(replace(shift, measures={k: np.full_like(v, np.nan) for k, v in shift.measures.items()})))
    nan = Estimate(np.nan, np.nan, np.nan, 0)
    figure_json(plot(replace(samples.mixed(), fixed={"a": nan})))


BAD = '<script>alert("x")</script>'


@pytest.mark.parametrize(
    "make",
    [lambda: replace(samples.shift(), spans=(BAD, "b", "c"), control=BAD),
     lambda: replace(samples.similarity(), by=(BAD, "b", BAD), embeddings=BAD, spans=(BAD, "b", "c")),
     lambda: replace(samples.shares(), conditions=(BAD,), accuracy={BAD: samples.about(1)}, margin={BAD: samples.about(1)}),
     lambda: replace(samples.shares(), spans=(BAD, "b", "last token")),
     lambda: replace(samples.table(), verdict=BAD, rows=tuple(replace(r, condition=BAD) for r in samples.table().rows), finding={"share k": BAD}),
     lambda: replace(samples.mixed(), formula=BAD, response=BAD, groups=BAD, fixed={BAD: samples.about(1)}, random={BAD: 1.0}),
     lambda: replace(samples.margin(), distance=BAD), lambda: replace(samples.margin(known=False), auroc_reason=BAD),
     lambda: replace(samples.pushed(), metric=BAD, unit=BAD), lambda: replace(samples.learned(), kind=BAD),
     lambda: replace(samples.strategies(), labels=(BAD, BAD), baseline=BAD, rows=tuple(replace(r, strategy=BAD, kind=BAD) for r in samples.strategies().rows))],
)  # fmt: skip
def test_words_from_data_stay_words(make: Any) -> None:
    result = make()
    for options in ({}, {"show": "answers"}, {"show": "shares"}) if type(result).__name__ == "FactorShares" else ({},):
        assert "<script>" not in plot(result, **options).to_json().replace("\\u003c", "<").replace("\\u003e", ">")
