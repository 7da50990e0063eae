"""Figures equal their data: every number drawn is the result's own number, and nothing from data can act as markup."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import views_samples as samples

from mechicl.errors import HeadIndexError, OptionError
from mechicl.views import theme, words
from mechicl.views.plots import figure_json, plot, plot_pattern
from mechicl.views.theme import DIVERGING


def trace(figure, name: str):
    return next(t for t in figure.data if t.name == name)


def test_a_score_grid_shows_the_values_and_carries_interval_null_p_and_rank() -> None:
    score = samples.head_scores()["induction"]
    cells = plot(score).data[0]
    np.testing.assert_array_equal(cells.z, score.value)
    for k, want in enumerate((score.low, score.high, score.null, score.null_high, score.p, score.p_corrected)):
        np.testing.assert_array_equal(np.asarray(cells.customdata)[..., k], want)
    assert np.asarray(cells.customdata)[1, 0, 6] == 1  # the best head has rank 1


def test_the_ranking_beside_the_grid_shows_the_same_numbers_with_their_intervals_and_nulls() -> None:
    score = samples.head_scores()["induction"]
    figure = plot(score, top=5)
    bars, null = trace(figure, "score, 95 % interval"), figure.data[2]
    top = score.top(5)
    np.testing.assert_array_equal(bars.x, [score.value[h] for h in top])
    assert list(bars.y) == [f"{a}.{b}" for a, b in top]
    np.testing.assert_allclose(
        bars.x + bars.error_x.array, [score.high[h] for h in top], atol=1e-15
    )  # one subtraction and one addition in float64
    np.testing.assert_allclose(bars.x - bars.error_x.arrayminus, [score.low[h] for h in top], atol=1e-15)
    np.testing.assert_array_equal(null.x, [score.null_high[h] for h in top])


def test_the_scale_is_centred_on_zero_and_does_not_blow_up_noise() -> None:
    figure = plot(samples.head_scores()["induction"])
    axis = figure.layout.coloraxis
    assert axis.cmin == -axis.cmax
    assert axis.cmid == 0
    assert axis.colorscale == tuple(map(tuple, DIVERGING))
    noise = samples.score("induction", ())
    assert plot(noise).layout.coloraxis.cmax >= 0.1 > np.abs(noise.value).max()


def test_significant_heads_are_marked_and_others_are_not() -> None:
    score = samples.head_scores()["induction"]
    dots = trace(plot(score), "above its null")
    assert {(round(y + 0.34), round(x - 0.38)) for x, y in zip(dots.x, dots.y, strict=True)} == set(samples.INDUCTION)
    assert len(trace(plot(samples.score("induction", ())), "above its null").x) == 0


def test_heads_that_share_keys_and_values_are_bracketed_only_where_they_do() -> None:
    score = samples.head_scores()["induction"]
    words = [a.text for a in plot(score, n_key_value_heads=2).layout.annotations]
    assert words == ["KV 0", "KV 1"]
    assert not plot(score, n_key_value_heads=4).layout.annotations
    assert not plot(score).layout.annotations


def test_a_head_without_a_pattern_stays_empty_and_unranked() -> None:
    score = samples.head_scores()["induction"]
    value = score.value.copy()
    value[2] = np.nan
    figure = plot(replace(score, value=value, p_corrected=np.where(np.isnan(value), np.nan, score.p_corrected)))
    assert np.isnan(np.asarray(figure.data[0].z)[2]).all()
    assert not any(str(y).startswith("2.") for y in trace(figure, "score, 95 % interval").y)


def test_all_scores_side_by_side_show_every_array_on_one_scale() -> None:
    result = samples.head_scores()
    figure = plot(result)
    maps = [t for t in figure.data if t.type == "heatmap"]
    assert [t.name for t in maps] == [words.words(name) for name in result.scores]
    for cells, score in zip(maps, result.scores.values(), strict=True):
        np.testing.assert_array_equal(cells.z, score.value)
        assert cells.coloraxis == "coloraxis"
    assert figure.layout.coloraxis.cmax == max(np.abs(s.value).max() for s in result.scores.values())


def test_attention_by_role_shows_the_heads_it_names() -> None:
    roles = samples.roles()
    cells = plot(roles).data[0]
    np.testing.assert_array_equal(cells.z, roles.value.reshape(12, -1))
    np.testing.assert_array_equal(np.asarray(cells.customdata)[..., 1], roles.high.reshape(12, -1))
    assert tuple(cells.x) == roles.spans
    some = plot(roles, heads=[(2, 1), (0, 3)]).data[0]
    np.testing.assert_array_equal(some.z, [roles.value[2, 1], roles.value[0, 3]])
    assert list(some.y) == ["2.1", "0.3"]


def test_many_heads_are_thinned_and_the_figure_says_so() -> None:
    figure = plot(samples.roles((36, 16)))
    assert len(figure.data[0].y) == 40
    assert "40 of 576" in figure.layout.title.subtitle.text


def test_accuracy_shows_every_way_of_counting_the_controls_and_all_margins() -> None:
    result = samples.accuracy()
    figure = plot(result, controls={"labels permuted": samples.estimate(0.2)})
    np.testing.assert_array_equal(
        trace(figure, "with the examples").x,
        [e.value for e in (result.accuracy, result.first_token_accuracy, result.open_accuracy, result.cla)],
    )
    assert result.zero_shot is not None
    np.testing.assert_array_equal(trace(figure, "control").x, [result.zero_shot.value, 0.2])
    np.testing.assert_array_equal(trace(figure, "margin").x, result.margins)
    assert any(s.x0 == result.chance for s in figure.layout.shapes)


def test_the_ablation_figure_shows_every_cell() -> None:
    result = samples.ablation()
    figure = plot(result)
    assert list(trace(figure, "intact").x) == [result.intact.accuracy.value]
    assert list(trace(figure, "chosen heads off together").x) == [result.chosen.accuracy.value]
    np.testing.assert_array_equal(trace(figure, "one head off").x, [c.accuracy.value for c in result.singles])
    np.testing.assert_array_equal(trace(figure, "matched random heads, one dot a draw").x, [c.accuracy.value for c in result.random])
    assert list(trace(figure, "random, mean").x) == [result.random_mean.value]
    assert result.zero_shot is not None
    assert list(trace(figure, "zero-shot").x) == [result.zero_shot.value]
    change = 100 * result.chosen.change.value
    assert f"{change:+.1f} points" in figure.layout.title.subtitle.text
    assert "none of 20 random draws falls as far (p = 0.048)" in figure.layout.title.subtitle.text


def test_an_ablation_of_one_head_has_no_row_of_single_heads() -> None:
    names = [t.name for t in plot(samples.ablation(samples.PREVIOUS, 0.96)).data]
    assert "one head off" not in names
    assert "chosen heads off together" in names


def test_the_dose_curve_shows_curve_and_band() -> None:
    result = samples.dose()
    figure = plot(result)
    chosen = trace(figure, "top heads by induction")
    np.testing.assert_array_equal(chosen.x, result.ks)
    np.testing.assert_array_equal(chosen.y, [a.value for a in result.accuracy])
    np.testing.assert_array_equal(trace(figure, "random high").y, result.random_high)
    np.testing.assert_array_equal(trace(figure, "95 % of up to 20 random draws").y, result.random_low)
    np.testing.assert_array_equal(trace(figure, "random heads, mean").y, result.random_mean)


def test_growth_shows_every_measure_and_names_the_stages() -> None:
    result = samples.series()
    figure = plot(result)
    for name, values in result.values.items():
        np.testing.assert_array_equal(trace(figure, name).y, values)
        np.testing.assert_array_equal(trace(figure, name).x, result.steps)
    np.testing.assert_array_equal(trace(figure, "accuracy high").y, result.high["accuracy"])
    assert [a.text for a in figure.layout.annotations] == ["1 repeated tokens", "2 words", "3 pictures"]


def test_a_pattern_is_drawn_at_the_asked_positions_without_its_future() -> None:
    view = samples.prompt()
    where = [0, 5, 9, len(view.tokens) - 1]
    z = np.asarray(plot_pattern(view, (1, 0), positions=where).data[0].z)
    want = view.patterns[(1, 0)][np.ix_(where, where)].astype(np.float32)
    np.testing.assert_array_equal(np.nan_to_num(z), np.tril(want))
    assert np.isnan(z[0, 1])
    with pytest.raises(OptionError, match="must be one of the patterns"):
        plot_pattern(view, (2, 3))


def test_text_from_data_is_never_markup_in_a_figure() -> None:
    view = samples.hostile_prompt()
    text = plot_pattern(view, (1, 0)).to_json()
    assert "<img" not in text
    assert "</script" not in text
    score = replace(samples.head_scores()["induction"], name="<i>x</i>", null_name="<a href='javascript:1'>n</a>")
    drawn = str(plot(score).to_dict())
    assert "&lt;i&gt;x" in drawn
    assert "<i>" not in drawn
    assert "<a href" not in drawn


def test_the_same_result_gives_the_same_bytes() -> None:
    assert plot(samples.head_scores()).to_json() == plot(samples.head_scores()).to_json()


def test_dark_figures_differ_in_look_only() -> None:
    light, dark = plot(samples.dose()), plot(samples.dose(), dark=True)
    assert figure_json(light) == figure_json(dark)
    assert light.layout.template.layout.font.color != dark.layout.template.layout.font.color
    assert dark.layout.template.layout.paper_bgcolor == theme.DARK_PAPER  # light words need it where a figure stands alone
    assert "sendChartToCloud" in light.layout.template.layout.modebar.remove  # a button that uploads the figure, also in a notebook


def test_only_results_can_be_drawn() -> None:
    with pytest.raises(OptionError, match="must be a result"):
        plot({"a": 1})


def test_unknown_heads_are_refused() -> None:
    with pytest.raises(HeadIndexError, match="3 x 4 model"):
        plot(samples.roles(), heads=[(3, 0)])


def test_head_names_are_those_of_the_command_line() -> None:
    assert words.name((31, 15)) == "31.15"
