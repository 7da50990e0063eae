"""One file that tells the whole story: opens from disk with no network, is the same bytes for the same input, and escapes every word from data.

check_writable(path)                       # before any long work
write_report(path, ReportContent(study))   # about 7 MB: plotly and circuitsvis are inside
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from mechicl.errors import OutputPathError
from mechicl.results import PromptView, Study
from mechicl.views import attention, captions, overlay, plots, story, tables, theme
from mechicl.views.grids import name

LIMIT_BYTES = 12_000_000
"""A report is refused beyond this size; it never comes near with the limits of `attention` and `overlay`."""


@dataclass(frozen=True, eq=False)
class ReportContent:
    """What goes into a report. `title` stands on top; `command` is the line that makes the report again; `max_prompts` how many prompts are drawn."""

    study: Study
    title: str = ""
    command: str = ""
    max_prompts: int = 2


@dataclass(frozen=True)
class Block:
    """A figure with its words and its data. `figure` is plotly's JSON, safe inside a script element; `csvs`: (link text, file name, data: address)."""

    id: str
    heading: str
    figure: Markup
    height: int
    words: captions.Words
    csvs: tuple[tuple[str, str, str], ...]
    table: tables.Table | None = None


def check_writable(path: str | Path) -> Path:
    """The path, if a file can be written there; nothing is left behind.

    Raises:
        OutputPathError: the folder is missing or read-only, the path is a folder, or an existing file may not be replaced.
    """
    target = Path(path).expanduser()
    if target.is_dir():
        raise OutputPathError(f"out must be a file; got the folder {target}. Add a file name, e.g. {target / 'report.html'}.")
    if not target.parent.is_dir():
        raise OutputPathError(f"out must lie in an existing folder; there is no folder {target.parent}. Create it, or write elsewhere.")
    if target.exists() and not os.access(target, os.W_OK):
        raise OutputPathError(
            f"out must be a file that may be replaced; {target} is read-only. Change its permissions, or write elsewhere."
        )
    try:
        handle, probe = tempfile.mkstemp(prefix=".mechicl-", dir=target.parent)
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        raise OutputPathError(
            f"out must be writable; a file cannot be created in {target.parent} ({error.strerror}). Change its permissions, or write elsewhere."
        ) from error
    return target


def write_report(path: str | Path, content: ReportContent) -> Path:
    """Write the report, first under a temporary name in the same folder, then renamed: a reader never sees half of it.

    Returns:
        Where it was written.

    Raises:
        OutputPathError: it cannot be written there, or it would be larger than `LIMIT_BYTES`.
    """
    target = check_writable(path)
    page = render_report(content).encode("utf-8")
    if len(page) > LIMIT_BYTES:
        raise OutputPathError(
            f"the report must be under {LIMIT_BYTES} bytes; got {len(page)}. Draw fewer prompts (max_prompts) or smaller pictures."
        )
    try:
        handle, temporary = tempfile.mkstemp(prefix=".mechicl-", suffix=".html", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(page)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        raise OutputPathError(
            f"out must be writable; writing {target} raised {error.strerror}. Free some space, or write elsewhere."
        ) from error
    return target


def render_report(content: ReportContent) -> str:
    """The report as one HTML string."""
    study = content.study
    title = content.title or f"The in-context-learning circuit of {study.provenance.model} on {study.provenance.task or 'this task'}"
    prompts = study.prompts[: content.max_prompts]
    chosen = _chosen(study)
    views = [_patterns(view, k, chosen) for k, view in enumerate(prompts[:1])]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=title, command=content.command, study=study, headline=story.headline(study), summary=story.summary(study), tiles=story.top_line(study),
            learns=story.learns(study.accuracy), accuracy=_accuracy(study), overview=_overview(study), scores=_scores(study), roles=_roles(study),
            strips=[(overlay.strip(view, _groups(study, chosen, view)), f"strip-{k}", [_csv(f"prompt-{k}", tables.prompt_frame(view))]) for k, view in enumerate(prompts)], badge=story.badge,
            overlays=_overlays(study, prompts), overlay_words=captions.about_overlay(), patterns=[v for v in views if v], sets=_sets(study), effects=_effects(study), growth=_growth(study), trace=_trace(study),
            provenance=_provenance(study), definitions=captions.DEFINITIONS, kinds=theme.ROLE_COLOURS, name=name,
            style=Markup(_static("style.css")), script=Markup(_static("script.js")), plotly=Markup(plots.javascript()),
            circuitsvis=Markup(attention.library()) if any(views) else "",
            themes=_json({"light": theme.template(), "dark": theme.template(dark=True), "scales": {
                "diverging": [theme.DIVERGING, theme.DIVERGING_DARK], "sequential": [theme.SEQUENTIAL, theme.SEQUENTIAL_DARK]}}),
        )
    )  # fmt: skip


def _chosen(study: Study, limit: int = 8) -> list[tuple[int, int]]:
    """Heads to look at closely: the found ones, kind by kind in turn; where none was found, the top induction-like ones, so that there is something to see."""
    found = [list(s.heads) for s in study.sets if s.heads]
    turns = [f[k] for k in range(max((len(f) for f in found), default=0)) for f in found if k < len(f)]
    out = list(dict.fromkeys(turns))
    if not out:
        out = study.scores.top(next(iter(study.scores.scores)), 4)
    return out[:limit]


def _groups(study: Study, chosen: list[tuple[int, int]], view: PromptView) -> dict[str, list[tuple[int, int]]]:
    """The chosen heads under the name of the first kind that found them."""
    out: dict[str, list[tuple[int, int]]] = {}
    for head in chosen:
        kind = next((s.kind for s in study.sets if head in s.heads), "")
        if head in view.rows:
            out.setdefault(kind, []).append(head)
    return out


def _csv(identifier: str, frame: pd.DataFrame, words: str = "Data as CSV") -> tuple[str, str, str]:
    """(link text, file name, data: address) of a table."""
    file = f"mechicl_{identifier}".replace("-", "_") + ("" if words == "Data as CSV" else "_" + words.replace(" ", "_"))
    return words, f"{file}.csv", tables.csv_uri(frame)


def _block(
    identifier: str,
    heading: str,
    figure: Any,
    words: captions.Words,
    frame: pd.DataFrame,
    *,
    raw: pd.DataFrame | None = None,
    with_table: bool = True,
) -> Block:
    plain = plots.figure_json(figure)
    csvs = [_csv(identifier, frame), *([_csv(identifier, raw, "per prompt")] if raw is not None else [])]
    return Block(
        identifier, heading, _json(plain), int(plain["layout"].get("height", 400)), words, tuple(csvs),
        tables.table(frame) if with_table else None,
    )  # fmt: skip


def _accuracy(study: Study) -> Block:
    a = study.accuracy
    return _block(
        "accuracy",
        "",
        plots.plot(a, controls=study.controls),
        captions.about_accuracy(a, study.controls),
        tables.accuracy_frame(a, study.controls),
        raw=a.to_frame(),
    )


def _overview(study: Study) -> Block:
    return _block("scores", "", plots.plot(study.scores), captions.about_scores(study), study.scores.to_frame(), with_table=False)


def _scores(study: Study) -> list[Block]:
    frame = study.scores.to_frame()
    again = study.replication.to_frame()
    frame = frame.assign(value_on_other_episodes=again["value"].to_numpy()) if len(again) == len(frame) else frame
    out = []
    first = [s.score for s in study.sets]
    for key, score in sorted(study.scores.scores.items(), key=lambda item: first.index(item[0]) if item[0] in first else len(first)):
        figure = plots.plot(score, n_key_value_heads=study.scores.n_key_value_heads)
        part = frame.loc[frame["score"] == key].sort_values(by="value", ascending=False, kind="stable")
        out.append(_block(f"score-{len(out)}", key.replace("_", " "), figure, captions.about_score(score), part))
    return out


def _roles(study: Study) -> Block:
    return _block("attention-by-role", "", plots.plot(study.roles), captions.about_roles(study.roles), study.roles.to_frame())


def _sets(study: Study) -> list[dict[str, Any]]:
    out = []
    for k, found in enumerate(study.sets):
        blocks = []
        if found.ablation is not None:
            blocks.append(
                _block(
                    f"ablation-{k}", "", plots.plot(found.ablation), captions.about_ablation(found), tables.ablation_frame(found.ablation)
                )
            )
        if found.dose is not None:
            blocks.append(_block(f"dose-{k}", "", plots.plot(found.dose), captions.about_dose(found.dose), found.dose.to_frame()))
        out.append({"set": found, "sentence": story.set_sentence(found), "blocks": blocks, "heads": story.heads_in_words(found.heads)})
    return out


def _effects(study: Study) -> Block | None:
    if study.effects is None:
        return None
    figure = plots.plot(study.effects, n_key_value_heads=study.scores.n_key_value_heads)
    frame = replace(study.scores, scores={study.effects.name: study.effects}).to_frame()
    return _block(
        "effects",
        "",
        figure,
        captions.about_effects(study.effects, study.n_find),
        frame.sort_values(by="value", ascending=False, kind="stable"),
    )


def _trace(study: Study) -> dict[str, Any] | None:
    """The two sections of the trace: sentences, figures, and why a part is missing; None where nothing was traced."""
    t = study.trace
    if t is None:
        return None
    route, circuit = [], []
    if t.patching is not None:
        route.append(_block("patching", "", plots.plot(t.patching), captions.about_patching(t.patching), t.patching.to_frame()))
    if t.curve is not None:
        circuit.append(_block("circuit-curve", "", plots.plot(t.curve), captions.about_curve(t.curve), t.curve.to_frame()))
    if t.circuit is not None:
        circuit.append(_block("circuit-graph", "", plots.plot(t.circuit), captions.about_circuit(t.circuit), t.circuit.to_frame()))
    if t.edge_scores is not None:
        circuit.append(
            _block("edge-scores", "", plots.plot(t.edge_scores), captions.about_edge_scores(t.edge_scores), t.edge_scores.to_frame())
        )
    told = [s(t.patching) for s in (story.route_sentence, story.heads_sentence)] if t.patching is not None else []
    return {
        "route": route, "circuit": circuit, "told": [s for s in told if s], "notes": story.trace_notes(t),
        "claim": story.circuit_sentence(t.circuit) if t.circuit is not None else "",
    }  # fmt: skip


def _growth(study: Study) -> Block | None:
    if study.growth is None:
        return None
    return _block("growth", "", plots.plot(study.growth), captions.about_growth(study.growth), study.growth.to_frame())


def _overlays(study: Study, prompts: tuple[PromptView, ...]) -> list[dict[str, Any]]:
    """The first prompt's pictures under the heads that look at them most; nothing for families without image tokens."""
    own = {h for s in study.sets if s.score == "ila" for h in s.heads}
    out = []
    for view in prompts[:1]:
        if any(view.image_boxes):
            rows = overlay.picture_grid(view, list(view.rows), own_label=own)
            rows.sort(key=lambda row: (-sum(p.share for p in row.pictures), row.head))
            rows = [row for row in rows if row.top >= overlay.FAINT][:6] or rows[:1]
            out.append({"view": view, "rows": rows, "csvs": [_csv("pictures", tables.overlay_frame(rows))]})
    return out


def _patterns(view: PromptView, k: int, heads: list[tuple[int, int]]) -> dict[str, Any] | None:
    """The token view of circuitsvis for prompts it can carry, a heat map of thinned positions for longer ones."""
    kept = [h for h in heads if h in view.patterns]
    if not kept:
        return None
    if len(view.tokens) <= attention.LONGEST:
        drawn = attention.attention_view(view, kept, element_id=f"patterns-{k}")
        csvs = [_csv(f"patterns-{k}", tables.pattern_frame(view, drawn.heads, drawn.positions))]
        return {
            "csvs": csvs,
            "view": drawn,
            "words": captions.about_patterns(drawn.note),
            "call": Markup(drawn.call),
            "element": Markup(drawn.element),
            "blocks": [],
        }
    positions = attention.choose_positions(view, 256, kept)
    blocks = []
    for head in kept[:4]:
        pattern = pd.DataFrame(
            {
                "dest": len(view.tokens) - 1,
                "src": range(len(view.tokens)),
                "token": view.tokens,
                "attention": view.rows.get(head, view.patterns[head][-1]),
            }
        )
        note = f"{len(positions)} of {len(view.tokens)} tokens are drawn; the CSV has the last token's whole row."
        blocks.append(
            _block(
                f"pattern-{k}-{head[0]}-{head[1]}",
                name(head),
                plots.plot_pattern(view, head, positions=positions),
                captions.about_patterns(note),
                pattern,
                with_table=False,
            )
        )
    return {"csvs": [], "view": None, "words": captions.about_patterns(""), "call": "", "element": "", "blocks": blocks}


def _provenance(study: Study) -> list[tuple[str, str]]:
    p = study.provenance
    rows = [("model", p.model), ("revision", p.revision), ("dtype", p.dtype), ("attention", p.attention), ("device", p.device), ("task", p.task),
            ("seed", "" if p.seed is None else str(p.seed)), ("episodes", f"{study.n_find} to find the heads, {study.n_prove} others to prove them")]  # fmt: skip
    rows += [(f"option {key}", str(value)) for key, value in sorted(p.options.items())]
    rows += [(f"version of {key}", str(value)) for key, value in sorted(p.versions.items())]
    return [(key, value) for key, value in rows if value]


def _json(value: Any) -> Markup:
    """JSON for a script element: nothing in it can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return Markup(
        text.replace("&", "\\u0026")
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def _static(file: str) -> str:
    return (Path(__file__).parent / "templates" / file).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["json_script"] = _json
    environment.filters["sentence"] = story.sentence
    environment.filters["round"] = lambda x, digits=2: f"{x:.{digits}f}"
    return environment
