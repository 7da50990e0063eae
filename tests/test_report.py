"""The report: opens from disk with no network and no error, shows the result's numbers, escapes every word from data, is the same bytes every time."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import views_samples as samples
import views_samples_causal as causal
import views_samples_kv as keys

from mechicl.errors import OutputPathError
from mechicl.results import HeadSet, Study
from mechicl.views import kv_story, story, trace_story
from mechicl.views.plots import plot
from mechicl.views.report import LIMIT_BYTES, ReportContent, check_writable, render_report, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


class Page(HTMLParser):
    """Every tag with its attributes, every script's and style's text, and the text a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.inside: str | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        self.inside = tag if tag in ("script", "style") else None
        if tag == "script":
            self.scripts.append((self.tags[-1][1], ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            attrs, text = self.scripts[-1]
            self.scripts[-1] = (attrs, text + data)
        elif self.inside is None:
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))

    def csv(self, file: str) -> pd.DataFrame:
        (uri,) = [a["href"] for tag, a in self.tags if tag == "a" and a.get("download") == file]
        return pd.read_csv(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))

    def figure(self, identifier: str) -> dict:
        (text,) = [t for a, t in self.scripts if a.get("data-for") == identifier]
        return json.loads(text)


@pytest.fixture(scope="module")
def study() -> Study:
    return replace(samples.study(), trace=causal.trace(), kv=keys.story())


@pytest.fixture(scope="module")
def html(study: Study) -> str:
    return render_report(ReportContent(study, command="mechicl report --model demo"))


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def browse(path: Path, tmp_path: Path, *flags: str) -> tuple[str, list[str]]:
    """The page's DOM after its scripts ran, and what it wrote to the console, in a browser that can reach no network."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--log-level=0",
        "--virtual-time-budget=20000", "--window-size=1440,1200", *flags, path.as_uri(),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return run.stdout, [line for line in run.stderr.splitlines() if ":CONSOLE" in line]


@needs_browser
def test_it_opens_in_a_browser_without_a_network_and_draws_everything(html: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(html, encoding="utf-8")
    dom, console = browse(path, tmp_path, "--dump-dom")
    assert console == []
    assert 'data-ready="true"' in dom
    drawn = set(re.findall(r'<div class="plot js-plotly-plot" id="([\w-]+)"', dom))
    hidden = {f"score-{k}" for k in range(1, 5)}  # tabs that nobody opened yet
    assert set(re.findall(r'data-for="([\w-]+)"', html)) - drawn == hidden
    assert dom.count('class="main-svg"') >= len(drawn)
    patterns = dom[dom.index('id="patterns-0"') :]
    assert "<canvas" in patterns[:20000]  # circuitsvis drew


@needs_browser
def test_the_browser_test_can_fail(html: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.html"
    path.write_text(html.replace("</body>", '<script>fetch("http://localhost/x"); missing()</script></body>'), encoding="utf-8")
    _, console = browse(path, tmp_path, "--dump-dom")
    assert any("missing is not defined" in line for line in console)
    assert any("Content Security Policy" in line for line in console)  # the page forbids itself every request


@needs_browser
def test_hostile_labels_run_nothing_in_the_browser(tmp_path: Path) -> None:
    study = replace(samples.study(), prompts=(samples.hostile_prompt(),))
    path = write_report(tmp_path / "hostile.html", ReportContent(study, title='"><script>alert(1)</script>'))
    dom, console = browse(path, tmp_path, "--dump-dom")
    assert console == []
    assert 'data-ready="true"' in dom
    assert not [a for tag, a in Page(dom).tags if "onerror" in a]


def test_nothing_outside_the_file_is_named(page: Page) -> None:
    for tag, attrs in page.tags:
        for key in ("src", "href", "action", "srcset", "poster", "data"):
            if key in attrs:
                assert attrs[key].startswith(("#", "data:")), (tag, key, attrs[key][:80])
        assert "@import" not in attrs.get("style", "")
        assert "url(" not in attrs.get("style", "")
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy


def test_labels_that_look_like_html_stay_text() -> None:
    study = replace(samples.study(), prompts=(samples.hostile_prompt(),), notes=("<script>note()</script>",))
    clean, dirty = Page(render_report(ReportContent(samples.study(), max_prompts=1))), Page(render_report(ReportContent(study)))
    assert not [a for _, a in dirty.tags if "onerror" in a]
    assert [t for t, _ in dirty.tags if t == "i"] == [t for t, _ in clean.tags if t == "i"] == []
    assert len(dirty.scripts) == len(clean.scripts)  # no script more than without them
    assert "<script>note()</script>" in dirty.words
    assert 'onerror="alert(1)"' in dirty.words  # the reader sees what the label is


def test_it_is_one_small_file_and_the_same_bytes_every_time(html: str, study: Study) -> None:
    assert len(html.encode()) < LIMIT_BYTES == 12_000_000
    assert render_report(ReportContent(study, command="mechicl report --model demo")) == html
    assert html.count("Plotly.js v") <= 1


def test_figures_in_the_page_carry_the_results_numbers(page: Page, study: Study) -> None:
    def array(value) -> np.ndarray:
        if isinstance(value, dict):
            flat = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
            return flat.reshape([int(n) for n in value["shape"].split(",")]) if "shape" in value else flat
        return np.asarray(value, dtype=float)

    np.testing.assert_array_equal(array(page.figure("score-0")["data"][0]["z"]), study.scores["induction"].value)
    dose = study.sets[0].dose
    assert dose is not None
    np.testing.assert_array_equal(array(page.figure("dose-0")["data"][3]["y"]), [a.value for a in dose.accuracy])
    assert study.growth is not None
    np.testing.assert_array_equal(array(page.figure("growth")["data"][2]["y"]), study.growth.values["accuracy"])


def test_csv_downloads_hold_the_results_numbers_exactly(page: Page, study: Study) -> None:
    scores = page.csv("mechicl_scores.csv")
    np.testing.assert_array_equal(scores["value"], study.scores.to_frame()["value"])
    np.testing.assert_array_equal(scores["p_corrected"], study.scores.to_frame()["p_corrected"])
    per_prompt = page.csv("mechicl_accuracy_per_prompt.csv")
    np.testing.assert_array_equal(per_prompt["margin_nats"], study.accuracy.margins)
    accuracy = page.csv("mechicl_accuracy.csv").set_index("measure")
    assert accuracy.loc["accuracy", "value"] == study.accuracy.accuracy.value
    assert accuracy.loc["labels permuted", "value"] == study.controls["labels permuted"].value
    ablation = page.csv("mechicl_ablation_0.csv")
    cells = study.sets[0].ablation
    assert cells is not None
    assert ablation.loc[ablation["kind"] == "chosen", "accuracy"].item() == cells.chosen.accuracy.value
    assert ablation.loc[ablation["kind"] == "intact", "accuracy"].item() == cells.intact.accuracy.value
    np.testing.assert_array_equal(page.csv("mechicl_attention_by_role.csv")["value"], study.roles.value.ravel())
    assert study.growth is not None
    assert len(page.csv("mechicl_growth.csv")) == len(study.growth.to_frame())


def test_what_is_drawn_on_the_prompt_can_be_downloaded_too(page: Page, study: Study) -> None:
    view = study.prompts[0]
    tokens = page.csv("mechicl_prompt_0.csv")
    np.testing.assert_array_equal(tokens["head 1.0"], view.rows[(1, 0)])
    assert list(tokens["role"]) == list(view.roles)
    patterns = page.csv("mechicl_patterns_0.csv")
    one = patterns[(patterns["head"] == 1.2) & (patterns["dest"] == 20) & (patterns["src"] == 3)]
    assert one["attention"].item() == pytest.approx(view.patterns[(1, 2)][20, 3], abs=5e-5)  # four digits
    patches = page.csv("mechicl_pictures.csv")
    position, box = next(iter(view.image_boxes[-1].items()))
    query = patches[(patches["head"] == 0.1) & (patches["position"] == position)]
    assert query["attention"].item() == view.rows[(0, 1)][position]
    assert tuple(query[["left", "top", "right", "bottom"]].iloc[0]) == box


def test_every_figure_says_what_it_shows_how_it_misleads_and_on_how_many_prompts(html: str, page: Page) -> None:
    figures = len(re.findall(r"data-for=", html)) + 2  # and the pictures, and the token view
    assert page.words.count("What this shows.") == figures
    assert page.words.count("How it can mislead.") == figures
    assert html.count('<p class="claim">') == figures


def test_sections_headings_and_keyboard(page: Page) -> None:
    targets = {a["href"][1:] for tag, a in page.tags if tag == "a" and a["href"].startswith("#")}
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert targets <= set(ids)
    assert {
        "summary",
        "prompt",
        "accuracy-and-controls",
        "head-scores",
        "by-role",
        "pictures",
        "patterns",
        "proof",
        "route",
        "the-circuit",
        "examples",
        "growth-section",
        "provenance",
        "definitions",
    } <= targets
    for tag, attrs in page.tags:
        if attrs.get("role") == "tab":
            assert attrs["aria-controls"] in ids
        if attrs.get("role") == "button" and tag != "button":
            assert "tabindex" in attrs


def test_the_claim_is_made_from_the_numbers(page: Page, study: Study) -> None:
    words = page.words
    assert "4 induction heads and 2 label-to-image heads are needed for it" in words
    cells = study.sets[0].ablation
    assert cells is not None
    for estimate in (study.accuracy.accuracy, cells.chosen.accuracy, cells.random_mean, study.controls["labels permuted"]):
        assert f"{100 * estimate.value:.1f}" in words
    assert "redundant, not irrelevant" in words
    assert "Heads were chosen on 64 prompts" in words


def test_where_nothing_is_found_the_page_says_so() -> None:
    study = samples.study(holds=False)
    words = Page(render_report(ReportContent(study))).words
    assert "does not show that" in words
    assert "no head passes its null" in words
    assert "needed for it" not in words
    learner = replace(study, accuracy=samples.accuracy(0.95))
    assert "no head passes its null: this run does not say which heads do it" in story.headline(learner)
    harmless = HeadSet("induction", "induction", "rule", samples.INDUCTION, "irrelevant", "Costs nothing.", samples.ablation(after=0.95))
    assert "none is proven: without the induction heads accuracy goes from" in story.headline(replace(learner, sets=(harmless,)))
    assert story.headline(replace(learner, sets=(harmless,))).endswith("which is no loss.")
    shared = HeadSet("induction", "induction", "rule", samples.INDUCTION, "unspecific", "So do random heads.", samples.ablation())
    assert story.headline(replace(learner, sets=(harmless, shared))).endswith("but as many random heads can cost as much.")


def test_the_way_of_the_answer_and_its_circuit_are_told_from_the_numbers(page: Page, study: Study) -> None:
    words, trace = page.words, study.trace
    assert trace is not None
    assert trace.circuit is not None
    assert "at the start of layers 0 to 1" not in words  # the two layers do not have the same spans here
    assert "in the right label (0.93) and the wrong label (0.30)" in words
    assert "in the last token (1.02)" in words
    assert "14 of 190 edges carry 91 % (85 to 97) of the difference" in words
    assert "on 24 pairs that did not choose them; 20 random circuits of as many edges carry 3 % on average (p = 0.048)" in words
    assert "Pearson 0.93" in words
    curve = page.figure("circuit-curve")
    assert curve["layout"]["sliders"][0]["steps"][0]["label"] == "2"
    assert trace.patching is not None
    np.testing.assert_array_equal(page.csv("mechicl_patching.csv")["value"], trace.patching.to_frame()["value"])
    assert list(page.csv("mechicl_circuit_graph.csv")["edge"]) == [e.name for e in trace.circuit.edges]


def test_a_weak_circuit_is_not_called_the_circuit() -> None:
    good, weak = causal.circuit(), causal.circuit(faithful=0.4)
    assert trace_story.carries(good)
    assert not trace_story.carries(weak)
    assert trace_story.circuit_sentence(weak).endswith("This is not enough to call them the circuit.")
    assert not trace_story.carries(replace(good, random_high=0.9))  # random circuits do as well
    assert "which flatters them" in trace_story.circuit_sentence(causal.circuit(held_out=False))
    other = replace(good, completeness=causal.share(0.5))
    assert "part of the work is done elsewhere too" in trace_story.circuit_sentence(other)


def test_where_nothing_could_be_traced_the_page_says_why() -> None:
    from mechicl.results import Trace

    reason = "No minimal pairs, so nothing was patched: <b>no</b> label has a partner."
    nothing = replace(samples.study(), trace=Trace(None, None, None, None, "", 0, 0, (reason,)))
    words = Page(render_report(ReportContent(nothing))).words
    assert f"Nothing was patched. {reason}" in words
    assert "No circuit was established." in words
    half = replace(
        samples.study(),
        trace=replace(causal.trace(), circuit=None, curve=None, edge_scores=None, notes=("No circuit: heads are no summands.",)),
    )
    page = Page(render_report(ReportContent(half)))
    assert "No circuit: heads are no summands." in page.words
    assert page.figure("patching")
    assert "How the answer gets there" not in Page(render_report(ReportContent(samples.study()))).words


def test_a_way_that_nothing_shows_is_not_made_up() -> None:
    flat = causal.site("resid_pre", ("layer", "span"), {"layer": (0, 1), "span": causal.SPANS}, {})
    assert "No cell of resid pre passes its corrected test on 24 pairs" in trace_story.route_sentence(
        replace(causal.patched(), sites={"resid_pre": flat})
    )
    assert trace_story.route_sentence(replace(causal.patched(), sites={"z": causal.by_head()})) == ""
    noise = trace_story.route(causal.patched("noise"))
    assert noise[0][1][0][0] == "right label"  # what it costs counts, not what is left
    assert noise[0][1][0][1] == pytest.approx(0.93)


def test_what_an_example_changes_is_told_from_the_numbers(page: Page, study: Study) -> None:
    assert study.kv is not None
    shift, shares, margin = study.kv.shift, study.kv.shares, study.kv.margin
    assert shift is not None
    assert shares is not None
    assert margin is not None
    for text in kv_story.kv_told(study.kv):
        assert " ".join(text.split()) in page.words
    assert f"{100 * shares.pooled['v']['semantics'].value:.0f} %" in page.words
    assert f"{margin['k'].held_out.value:.2f}" in page.words
    assert "Our definition; the paper's could not be read." in page.words
    np.testing.assert_array_equal(page.csv("mechicl_kv_shift.csv")["value"], shift.to_frame()["value"])
    np.testing.assert_array_equal(page.csv("mechicl_kv_margin.csv")["auroc"], margin.to_frame()["auroc"])
    assert len(page.figure("kv-plane")["data"]) == len(plot(shares).data)
    assert "What an example changes" not in Page(render_report(ReportContent(replace(study, kv=None)))).words


def test_examples_that_move_less_than_filler_are_not_praised() -> None:
    shift = keys.shift()
    assert shift.test is not None
    assert "values of the last token, further than the filler does" in kv_story.shift_sentence(shift)
    less = {key: replace(e, value=-abs(e.value)) for key, e in shift.test.pooled.items()}
    turned = replace(shift, test=replace(shift.test, pooled=less, pooled_p=dict.fromkeys(less, 0.001)))
    told = kv_story.shift_sentence(turned)
    assert "keys everywhere, and values everywhere, less far than the filler does" in told
    assert "further" not in told
    unsure = replace(shift, test=replace(shift.test, pooled_p=dict.fromkeys(less, 0.4)))
    assert "as far as these episodes can tell" in kv_story.shift_sentence(unsure)
    assert "From the zero-shot prompt" not in kv_story.shift_sentence(keys.shift_alone())


def test_a_margin_is_called_better_than_attention_only_where_its_gain_is_above_nought() -> None:
    margin = keys.margin()
    assert "better than attention: keys, values and match q \u00b7 k" in kv_story.margin_sentence(margin, "")
    same = {name: replace(part, held_out_gain=None) for name, part in margin.parts.items()}
    assert "none is clearly better than attention" in kv_story.margin_sentence(replace(margin, parts=same), "")
    assert "cannot be said: all answers are right" in kv_story.margin_sentence(keys.margin(known=False), "")
    assert "shift more from one control and less from the other" in kv_story.similarity_sentence(keys.similarity())
    test = keys.similarity(both=False)
    assert "Examples more like the query shift more (keys" in kv_story.similarity_sentence(test)
    weak = replace(test, comparisons=tuple(replace(c, p_corrected=0.3) for c in test.comparisons))
    assert "do not clearly shift more" in kv_story.similarity_sentence(weak)


def test_where_keys_and_values_could_not_be_read_the_page_says_why() -> None:
    reason = "No key-value shift: <b>no</b> episode can be compared."
    nothing = replace(samples.study(), kv=keys.story(shift=None, shares=None, margin=None, notes=(reason,)))
    words = Page(render_report(ReportContent(nothing))).words
    assert "Keys and values were not compared." in words
    assert reason in words
    alone = Page(render_report(ReportContent(replace(samples.study(), kv=keys.story(shares=None, margin=None)))))
    assert alone.figure("kv-shift")
    assert not [a for a, _ in alone.scripts if a.get("data-for") == "kv-plane"]


@needs_browser
def test_the_slider_moves_the_circuit_in_the_browser(html: str, study: Study, tmp_path: Path) -> None:
    probe = """<script>(async () => {
      const gd = document.getElementById("circuit-curve");
      const steps = gd.layout.sliders[0].steps, count = () => gd.data.filter((t) => (t.name || "").includes("->") && t.visible === true).length;
      const seen = [];
      for (const step of steps) { await Plotly.update(gd, ...step.args.map((a) => structuredClone(a))); seen.push(step.label + ":" + count()); }
      document.body.dataset.seen = seen.join(" ");
    })();</script>"""
    path = tmp_path / "slider.html"
    path.write_text(html.replace("</body>", probe + "</body>"), encoding="utf-8")
    dom, console = browse(path, tmp_path, "--dump-dom")
    assert console == []
    seen = re.search(r'data-seen="([^"]+)"', dom)
    assert seen is not None
    assert study.trace is not None
    assert study.trace.curve is not None
    assert seen.group(1) == " ".join(f"{k}:{k}" for k in study.trace.curve.ks if 0 < k <= 150)


@needs_browser
def test_figures_and_head_maps_answer_to_the_keyboard(html: str, study: Study, tmp_path: Path) -> None:
    probe = """<script>(async () => {
      const wait = (ms) => new Promise((done) => setTimeout(done, ms)), seen = [];
      const key = async (on, name) => { on.focus(); on.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true })); await wait(900); };
      await wait(900);
      const gd = document.getElementById("circuit-curve"), grip = gd.querySelector(".slider-container");
      const count = () => gd.data.filter((t) => (t.name || "").includes("->") && t.visible === true).length, off = () => gd._fullData.filter((t) => t.visible === "legendonly").length;
      seen.push("stops " + gd.querySelectorAll('[tabindex="0"]').length);
      for (const name of ["Home", "ArrowRight", "End", "ArrowRight"]) { await key(grip, name); seen.push(count() + "=" + grip.getAttribute("aria-valuetext")); }
      const entry = gd.querySelector(".legendtoggle"), before = off();
      await key(entry, "Enter");
      seen.push("off " + (off() > before) + " " + document.activeElement.matches(".legendtoggle"));
      await key(gd.querySelector(".legendtoggle"), " ");
      seen.push("on " + (off() === before));
      const tools = [...gd.querySelectorAll(".modebar-btn")];
      await key(tools[0], "ArrowLeft");
      seen.push("last " + (document.activeElement === tools.at(-1)) + " " + gd.querySelectorAll('.modebar-btn[tabindex="0"]').length);
      seen.push("cloud " + tools.some((tool) => /share/i.test(tool.getAttribute("aria-label") + tool.dataset.title)));
      const maps = [...document.querySelectorAll('.circuitsvis [role="button"]')], zoomed = () => [...document.querySelectorAll(".circuitsvis h3")].at(-1).textContent;
      await key(maps[1], "Enter");
      seen.push("map " + (maps[1].getAttribute("aria-label") === "Head " + zoomed().replace(" Zoomed", "")));
      document.body.dataset.seen = seen.join(", ");
    })();</script>"""
    path = tmp_path / "keys.html"
    path.write_text(html.replace("</body>", probe + "</body>"), encoding="utf-8")
    dom, console = browse(path, tmp_path, "--dump-dom")
    assert console == []
    assert study.trace is not None
    assert study.trace.curve is not None
    ks = [k for k in study.trace.curve.ks if 0 < k <= 150]
    seen = re.search(r'data-seen="([^"]+)"', dom)
    assert seen is not None
    slider = [f"{k}={k}" for k in (ks[0], ks[1], ks[-1], ks[-1])]
    assert seen.group(1).split(", ") == ["stops 3", *slider, "off true true", "on true", "last true 1", "cloud false", "map true"]


def test_paper_is_light_for_who_reads_in_the_dark() -> None:
    (style,) = re.findall(r"<style>(.*?)</style>", render_report(ReportContent(samples.study())), re.DOTALL)
    dark = set(re.findall(r"(:root[^{,\s]*) \{ --ink: #e4e8ee", style))
    assert len(dark) == 2  # chosen on the page; asked for by the system
    on_paper = style[style.index("@media print") :]
    for selector in dark:  # a weaker selector would lose, whatever comes last
        assert re.search(re.escape(selector) + r"[^}]*\{ --ink: #1d2530", on_paper)


def test_a_large_drop_that_the_test_cannot_see_is_not_called_irrelevance() -> None:
    weak = HeadSet("induction", "induction", "rule", samples.INDUCTION, "irrelevant", "No evidence.", samples.ablation(after=0.5))
    assert story.badge(weak) == "too few prompts to say"
    assert story.badge(replace(weak, ablation=samples.ablation(after=0.95))) == "not needed here"
    assert story.badge(replace(weak, finding="redundant")) == "redundant"


def test_accuracy_must_clear_its_controls_before_anything_is_claimed() -> None:
    assert story.learns(samples.accuracy(0.97))
    assert not story.learns(samples.accuracy(0.97, zero=0.97))
    assert not story.learns(samples.accuracy(0.27, zero=None))
    near = replace(samples.accuracy(), accuracy=samples.estimate(0.594, 32), zero_shot=samples.estimate(0.281, 32))
    assert story.learns(near)  # the two intervals touch; their difference is still above zero
    assert not story.learns(replace(near, zero_shot=samples.estimate(0.4, 32)))


def test_a_head_of_two_kinds_is_drawn_once() -> None:
    study = samples.study()
    twice = replace(study, sets=(study.sets[0], replace(study.sets[1], heads=samples.INDUCTION)))
    page = Page(render_report(ReportContent(twice, max_prompts=1)))
    buttons = [a["data-head"] for tag, a in page.tags if tag == "button" and "data-head" in a]
    assert buttons == ["", "1.0", "1.1", "1.2", "1.3"]


def test_a_study_without_prompts_growth_or_pictures_still_makes_a_page() -> None:
    study = replace(samples.study(), prompts=(), growth=None)
    words = Page(render_report(ReportContent(study))).words
    assert "Growth over training" not in words
    assert "Attention on the pictures" not in words
    blind = replace(samples.prompt(), image_boxes=({},) * 5)
    page = Page(render_report(ReportContent(replace(study, prompts=(blind,)))))
    assert "Attention on the pictures" not in page.words
    assert "The prompt" in page.words


def test_long_prompts_get_a_heat_map_instead_of_the_token_view() -> None:
    study = replace(samples.study(), prompts=(samples.prompt(per_image=100),))
    html = render_report(ReportContent(study))
    page = Page(html)
    assert "CircuitsVis.render(" not in html.replace("CircuitsVis.render(e", "")
    assert page.figure("pattern-0-1-0")["data"][0]["type"] == "heatmap"
    assert "256 of 537 tokens are drawn" in page.words
    assert len(html.encode()) < LIMIT_BYTES


def test_paths_that_cannot_be_written_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputPathError, match="existing folder"):
        check_writable(tmp_path / "no" / "report.html")
    with pytest.raises(OutputPathError, match="must be a file"):
        check_writable(tmp_path)
    with pytest.raises(OutputPathError, match="existing folder"):
        check_writable("/proc/version/report.html")
    assert check_writable(tmp_path / "report.html") == tmp_path / "report.html"
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)  # root may write anywhere, so the folder's own mode would not do
    with pytest.raises(OutputPathError, match="must be writable"):
        check_writable(tmp_path / "report.html")


def test_a_report_that_fails_leaves_the_old_one_alone(tmp_path: Path, study: Study) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="images must be PNG"):
        write_report(path, ReportContent(replace(study, prompts=(replace(samples.prompt(), images=(b"x",) * 5),))))
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    write_report(path, ReportContent(study))
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
