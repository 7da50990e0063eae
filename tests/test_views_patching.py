"""Figures of patching, attribution, cuts and edges equal their data, centre their colours on the run that was patched into, and escape every word."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import views_samples_causal as samples

from mechicl.errors import OptionError
from mechicl.results import Edge, PatchEffects, SiteEffects
from mechicl.results.nodes import feeds
from mechicl.views.plots import plot


def trace(figure: Any, name: str) -> Any:
    return next(t for t in figure.data if t.name == name)


def maps(figure: Any) -> list[Any]:
    return [t for t in figure.data if t.type == "heatmap"]


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


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_heat_map_shows_values_intervals_p_and_the_raw_mean(direction: str) -> None:
    result = samples.patched(direction)
    for cells, site in zip(maps(plot(result)), result.sites.values(), strict=True):
        np.testing.assert_array_equal(cells.z, site.value)
        for k, want in enumerate((site.low, site.high, site.p, site.p_corrected, site.raw.mean(0))):
            np.testing.assert_array_equal(np.asarray(cells.customdata)[..., k], want)
        assert f"n = {samples.N}" in cells.hovertemplate


@pytest.mark.parametrize(("direction", "start"), [("denoise", 0.0), ("noise", 1.0)])
def test_colours_are_centred_on_the_run_that_was_patched_into(direction: str, start: float) -> None:
    axis = plot(samples.patched(direction)).layout.coloraxis
    assert axis.cmid == start
    assert axis.cmax - start == pytest.approx(start - axis.cmin)
    assert axis.cmin <= 0 <= 1 <= axis.cmax  # both runs are on the scale
    ticks = dict(zip(axis.colorbar.tickvals, axis.colorbar.ticktext, strict=True))
    assert ticks[0.0] == "0 corrupt"
    assert "1 clean" in ticks[1.0]


def test_noise_stays_pale_and_one_overshooting_cell_does_not_drown_the_others() -> None:
    quiet = samples.site("z", ("layer", "head"), {"layer": (0, 1), "head": (0, 1)}, {})
    figure = plot(replace(samples.patched(), sites={"z": quiet}))
    assert figure.layout.coloraxis.cmax == 0.25
    wild = samples.site("z", ("layer", "head"), {"layer": (0, 1), "head": (0, 1)}, {(0, 0): 30.0})
    figure = plot(replace(samples.patched(), sites={"z": wild}))
    assert figure.layout.coloraxis.cmax == 1.25
    assert np.asarray(maps(figure)[0].z)[0, 0] == 30.0


def test_cells_that_pass_their_corrected_test_are_marked_and_counted() -> None:
    result = samples.patched()
    figure = plot(result)
    dots = [t for t in figure.data if t.name == "corrected p < 0.05"]
    for mark, site in zip(dots, result.sites.values(), strict=True):
        drawn = {(round(y + 0.32), round(x - 0.36)) for x, y in zip(mark.x, mark.y, strict=True)}
        assert drawn == {tuple(cell) for cell in np.argwhere(site.p_corrected < 0.05).tolist()}
    headings = [a.text for a in figure.layout.annotations]
    assert headings == ["<b>resid pre</b>  6/21", "<b>z</b>  3/12"]


def test_positions_heads_by_span_and_single_axes_are_laid_out_as_rows_and_columns() -> None:
    result = samples.patched_positions()
    positions, both, flat = maps(plot(result))
    np.testing.assert_array_equal(positions.z, result["resid_pre"].value)
    np.testing.assert_array_equal(both.z, result["z"].value.reshape(12, -1))
    np.testing.assert_array_equal(flat.z, result["image_features"].value[None])
    figure = plot(result)
    assert list(figure.layout.yaxis2.ticktext) == [f"{layer}.{head}" for layer in range(3) for head in range(4)]
    assert list(figure.layout.xaxis2.ticktext) == list(samples.SPANS)
    assert len(figure.layout.xaxis.tickvals) <= 16


def test_one_site_stands_beside_its_strongest_cells() -> None:
    result = samples.patched()
    figure = plot(result, site="resid_pre")
    ranked = trace(figure, "strongest cells, 95 % interval")
    site, top = result["resid_pre"], result.top("resid_pre", 14)
    cells = [site.index(layer=layer, span=span) for layer, span in top]
    np.testing.assert_array_equal(ranked.x, [site.value[c] for c in cells])
    assert list(ranked.y) == [f"{layer} · {span}" for layer, span in top]
    np.testing.assert_allclose(
        ranked.x + ranked.error_x.array, [site.high[c] for c in cells], atol=1e-15
    )  # one subtraction and one addition in float64
    with pytest.raises(OptionError, match="sites must be among"):
        plot(result, site="mlp_out")
    assert len(maps(plot(result, sites=["z"]))) == 1


def test_an_empty_cell_stays_empty() -> None:
    result = samples.patched()
    value = result["z"].value.copy()
    value[1] = np.nan
    hollow = replace(result["z"], value=value, p_corrected=np.where(np.isnan(value), np.nan, result["z"].p_corrected))
    cells = maps(plot(replace(result, sites={"z": hollow})))[0]
    assert np.isnan(np.asarray(cells.z)[1]).all()
    assert cells.hoverongaps is False


def test_an_attribution_is_shown_beside_its_agreement_with_exact_runs() -> None:
    result = samples.attribution()
    figure = plot(result)
    agreement = result.agreement
    assert agreement is not None
    for name, want in (("ranked high", ~agreement.random), ("drawn at random", agreement.random)):
        dots = trace(figure, name)
        np.testing.assert_array_equal(dots.x, agreement.approximate[want])
        np.testing.assert_array_equal(dots.y, agreement.exact[want])
    assert trace(figure, "ranked high").marker.symbol != trace(figure, "drawn at random").marker.symbol
    said = next(a.text for a in figure.layout.annotations if "Pearson" in a.text)
    assert "Pearson 0.93" in said
    assert "80% shared, 25% by chance" in said
    alone = plot(replace(result, agreement=None))
    assert not any(t.name == "ranked high" for t in alone.data)


def test_edges_are_drawn_only_where_they_can_exist() -> None:
    for result in (samples.paths(), samples.edge_scores()):
        figure = plot(result)
        z = np.asarray(maps(figure)[0].z)
        np.testing.assert_array_equal(z, result.value)
        real = np.array([[feeds(s, r) for r in result.receivers] for s in result.senders])
        np.testing.assert_array_equal(np.isfinite(z), real)
        assert list(figure.layout.xaxis.ticktext) == [r.name for r in result.receivers]
        assert list(figure.layout.yaxis.ticktext) == [s.name for s in result.senders]


def test_the_matrix_of_a_large_model_keeps_the_strongest_edges_and_says_so() -> None:
    from mechicl.results.nodes import receivers, senders

    rows, columns = senders(12, 16), receivers(12, 16, 4)
    rng = np.random.default_rng(0)
    value = np.array([[rng.normal(0, 0.01) if feeds(s, r) else np.nan for r in columns] for s in rows])
    best = Edge(rows[3], columns[-1])
    value[rows.index(best.sender), columns.index(best.receiver)] = 0.9
    result = replace(
        samples.edge_scores(), senders=rows, receivers=columns, value=value, low=value, high=value, raw=value[None], agreement=None
    )
    figure = plot(result)
    z = np.asarray(maps(figure)[0].z)
    assert z.shape[0] <= 48
    assert z.shape[1] <= 72
    at = list(figure.layout.yaxis.ticktext).index(best.sender.name), list(figure.layout.xaxis.ticktext).index(best.receiver.name)
    assert z[at] == 0.9
    assert f"of {len(rows)} senders" in figure.layout.title.subtitle.text


def test_transplants_cuts_and_function_vectors_show_effect_and_control() -> None:
    moved = samples.transplant()
    figure = plot(moved)
    np.testing.assert_array_equal(trace(figure, "this episode's activation").x, [r.effect.value for r in moved.rows])
    np.testing.assert_array_equal(trace(figure, "control: from 4 other episodes").x, [r.control.value for r in moved.rows])
    filled = [colour != "rgba(0,0,0,0)" for colour in trace(figure, "this episode's activation").marker.color]
    assert filled == [True, True, False]
    cut = samples.cuts()
    figure = plot(cut)
    np.testing.assert_array_equal(trace(figure, "cut").x, [r.accuracy.value for r in cut.rows])
    np.testing.assert_array_equal(trace(figure, "margin").x, [r.margin_change.value for r in cut.rows])
    np.testing.assert_array_equal(trace(figure, "matched control, 10 draws").x, [0.95] * 3)
    assert list(trace(figure, "cut").y) == [
        "right label \u2190 right image",
        "last token \u2190 right label, layer 0",
        "last token \u2190 right label, layers 1 to 2",
    ]
    vector = samples.function_vector()
    figure = plot(vector)
    for prompts in ("zero-shot", "labels shuffled"):
        part = [e for e in vector.effects if e.prompts == prompts]
        np.testing.assert_array_equal(trace(figure, prompts).y, [e.change_probability.value for e in part])
        draws = [np.quantile(np.concatenate([e.random_vectors, e.random_heads]), 0.025) for e in part]
        np.testing.assert_array_equal(trace(figure, f"95 % of random vectors, {prompts}").y, draws)


def test_text_from_data_is_never_markup() -> None:
    bad = "<img src=x onerror=alert(1)>"
    result = samples.patched()
    hostile = SiteEffects(
        bad,
        ("layer", "span"),
        {"layer": (0, 1, 2), "span": (bad, *samples.SPANS[1:])},
        *(getattr(result["resid_pre"], k) for k in ("value", "low", "high", "p", "p_corrected", "raw")),
    )
    effects: PatchEffects = replace(result, sites={"resid_pre": hostile}, metric=bad, pairs=bad, unit=bad)
    for figure in (
        plot(effects),
        plot(effects, site="resid_pre"),
        plot(replace(samples.transplant(), metric=bad, unit=bad)),
        plot(replace(samples.edge_scores(), pairs=bad, metric=bad)),
    ):
        text = str(figure.to_dict())
        assert "<img" not in text
        assert "&lt;img" in text
