"""Figures over many trainings: their arrays are the results' arrays, what has no interval gets none, text from data is text."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from mechicl.analysis.trainings.bands import runs_estimate, seed_bands
from mechicl.analysis.trainings.change_points import emergence
from mechicl.errors import OptionError
from mechicl.results import Correlations, Estimate, Forest, KnockOut, KnockOutTable
from mechicl.views.plots import plot, plot_sweep
from mechicl.views.trainings import called

STEPS = [0, *(2**k for k in range(12))]


def curves(n: int = 3) -> pd.DataFrame:
    """Runs whose measures jump at step 64 (the head) and 256 (the answers)."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(n):
        for i, step in enumerate(STEPS):
            rows.append({"cell": f"c{seed}", "preset": "cpu", "seed": seed, "step": step, "loss": 3.0, "accuracy_ic": 0.1 + 0.8 * (i > 8) + rng.normal(0, 0.01),
                         "ih_1.0": 0.4 * (i > 6) + rng.normal(0, 0.01)})  # fmt: skip
    return pd.DataFrame(rows)


def sweep(n_seeds: int = 3) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    rows = []
    for k in (64, 256, 1024):
        for code in ("rope", "<b>alibi</b>"):
            for seed in range(n_seeds):
                for step in (0, 100):
                    rows.append({"cell": f"{k}{code}{seed}", "preset": "cpu", "seed": seed, "K": k, "positions": code, "step": step,
                                 "accuracy_ic": (step > 0) * k / 2048 + rng.random() / 10, "accuracy_iw": rng.random()})  # fmt: skip
    return pd.DataFrame(rows)


def lines(figure: go.Figure) -> list[Any]:
    return [trace for trace in figure.data if trace.mode == "lines+markers" or (trace.mode == "lines" and trace.line.width)]


def test_bands_are_drawn_as_they_are_with_change_points() -> None:
    result = seed_bands(curves(), setting="K = 64", n=512)
    changes = emergence(curves())
    figure = plot(result, changes=changes)
    assert isinstance(figure, go.Figure)
    by_name = {trace.name: trace for trace in lines(figure)}
    np.testing.assert_array_equal(by_name["ICL: new classes"].y, result.values["accuracy_ic"])
    np.testing.assert_array_equal(by_name["IH, right minus wrong labels (head 1.0)"].y, result.values["ih_1.0"])
    assert by_name["ICL: new classes"].yaxis != by_name["IH, right minus wrong labels (head 1.0)"].yaxis
    filled = [trace for trace in figure.data if trace.fill == "tonexty"]
    np.testing.assert_array_equal(filled[0].y, result.low["accuracy_ic"])
    marked = {shape.x0 for shape in figure.layout.shapes if shape.x0 == shape.x1}
    assert marked == {point.at.value for point in changes.points}
    assert "mean of 3 runs" in figure.layout.title.subtitle.text
    assert "n = 512" in figure.layout.title.subtitle.text
    np.testing.assert_array_equal(np.asarray(plot(result, log=False).data[0].x), STEPS)


def test_one_run_has_no_band() -> None:
    figure = plot(seed_bands(curves(1)))
    assert not [trace for trace in figure.data if trace.fill]
    assert "mean of 1 run" in figure.layout.title.subtitle.text


def test_emergence_is_drawn_in_order() -> None:
    result = emergence(curves())
    figure = plot(result)
    assert (
        list(figure.data[1].y)
        == [called(p.measure) for p in result.points]
        == ["IH, right minus wrong labels (head 1.0)", "ICL: new classes"]
    )
    np.testing.assert_array_equal(figure.data[1].x, [p.at.value for p in result.points])


def test_a_sweep_is_the_mean_over_seeds_with_every_run_as_a_dot() -> None:
    table = sweep()
    figure = plot_sweep(table, "K", color="positions")
    drawn = lines(figure)
    assert [trace.name for trace in drawn] == ["rope", "&lt;b&gt;alibi&lt;/b&gt;"]
    last = table[(table["step"] == 100) & (table["positions"] == "rope")]
    np.testing.assert_allclose(drawn[0].y, last.groupby("K")["accuracy_ic"].mean())
    one = runs_estimate(last[last["K"] == 256]["accuracy_ic"].to_numpy(), unit="probability")
    assert list(drawn[0].customdata[1][:3]) == pytest.approx([one.low, one.high, 3])
    assert figure.layout.xaxis.type == "log"
    dots = [trace for trace in figure.data if trace.mode == "markers"]
    assert sum(len(trace.y) for trace in dots) == 18
    assert "3 runs (seeds) a point" in figure.layout.title.subtitle.text


def test_a_share_below_zero_is_not_cut_off() -> None:
    table = sweep()
    assert plot_sweep(table, "K").layout.yaxis.range[0] == pytest.approx(-0.03)
    table["accuracy_above_copying"] = table["accuracy_ic"] - 0.5
    figure = plot_sweep(table, "K", "accuracy_above_copying", facet="positions")
    lowest = min(min(trace.y) for trace in figure.data if "markers" in trace.mode)
    assert lowest < -0.1
    assert figure.layout.yaxis.range[0] == figure.layout.yaxis2.range[0] == pytest.approx(lowest - 0.03)
    below = runs_estimate(np.array([-0.10, -0.08, -0.06]), unit="probability")
    assert below.low < below.value < below.high < 0  # the interval holds its mean
    assert runs_estimate(np.array([0.0, 0.1, 0.05]), unit="probability").low == 0


def test_a_sweep_of_two_measures_in_panels_and_over_words() -> None:
    figure = plot_sweep(sweep(), "K", ["accuracy_ic", "accuracy_iw"], facet="positions")
    assert len(lines(figure)) == 4
    assert {note.text for note in figure.layout.annotations} == {"<b>positions rope</b>", "<b>positions &lt;b&gt;alibi&lt;/b&gt;</b>"}
    assert sum(bool(trace.showlegend) for trace in lines(figure)) == 2
    words = plot_sweep(sweep(), "positions", title="Over codes", levels={"copying": 0.5})
    assert list(words.layout.xaxis.ticktext) == ["rope", "&lt;b&gt;alibi&lt;/b&gt;"]
    assert not lines(words)  # words have no order: nothing joins them
    marks = next(trace for trace in words.data if trace.error_y.array is not None)
    np.testing.assert_allclose(marks.error_y.array, [row[1] - y for row, y in zip(marks.customdata, marks.y, strict=True)])
    assert words.layout.title.text == "<b>Over codes</b>"
    assert (words.layout.shapes[0].y0, words.layout.annotations[0].text) == (0.5, "copying")


def test_a_sweep_with_one_seed_and_holes_still_draws() -> None:
    table = sweep(1)
    table = table[~((table["positions"] == "rope") & (table["K"] == 64))]
    drawn = {trace.name: trace for trace in lines(plot_sweep(table, "K", color="positions"))}
    assert {name: len(trace.x) for name, trace in drawn.items()} == {"rope": 2, "&lt;b&gt;alibi&lt;/b&gt;": 3}
    assert np.isnan([row[0] for row in drawn["rope"].customdata]).all()


def test_correlations_and_forests_are_drawn_strongest_first() -> None:
    value = {"ph1_0.0": Estimate(0.2, -0.1, 0.4, 40), "ih_1.0": Estimate(-0.7, -0.9, -0.5, 40)}
    figure = plot(
        Correlations("accuracy_ic", "spearman", value, {"ph1_0.0": 0.3, "ih_1.0": 0.001}, {"ph1_0.0": 0.3, "ih_1.0": 0.002}, 40, 12)
    )
    assert list(figure.data[0].x) == [-0.7, 0.2]
    np.testing.assert_allclose(figure.data[0].error_x.arrayminus, [0.2, 0.3])
    assert "n = 40 models of 12 settings" in figure.layout.title.subtitle.text
    importance = {"a": Estimate(0.01, 0.0, 0.02, 12), "b": Estimate(0.5, 0.3, 0.6, 12)}
    tree = plot(Forest("accuracy_ic", Estimate(0.8, 0.7, 0.9, 12), np.array([-0.2, 0.05]), 0.05, importance, 40, 12))
    assert list(tree.data[0].x) == [0.5, 0.01]
    assert "shuffled control at most 0.05" in tree.layout.title.subtitle.text


def test_a_knock_out_table_is_drawn_with_its_levels() -> None:
    def row(name: str, kind: str, value: float) -> KnockOut:
        one = Estimate(value, value - 0.1, value + 0.1, 64)
        return KnockOut(name, kind, one, one, one)

    table = KnockOutTable((row("intact", "intact", 0.9), row("M1 emptied", "modality", 0.3)), 1 / 32, 0.51, 64, 1, "zero", "")
    figure = plot(table)
    assert list(figure.data[0].x) == [0.9, 0.3]
    assert {shape.x0 for shape in figure.layout.shapes} == {1 / 32, 0.51}
    assert len(table.to_frame()) == 2


def test_refusals() -> None:
    with pytest.raises(OptionError, match="a column of the table must be"):
        plot_sweep(sweep(), "L")
    with pytest.raises(OptionError, match="step must be one by which"):
        plot_sweep(sweep(), "K", step=-1)


def test_names_of_measures() -> None:
    assert called("ph1_0.0") == "PH(1), previous token (head 0.0)"
    assert called("accuracy_iw") == "in weights"
    assert called("<x>_y") == "&lt;x&gt; y"
