"""One file that tells the whole story: opens from disk with no network, is the same bytes for the same input, and escapes every word from data.

check_writable(path)                       # before any long work
write_report(path, ReportContent(study))   # about 7 MB: plotly and circuitsvis are inside
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from mechicl.results import PromptView, Study
from mechicl.views import attention, captions, overlay, plots, story, strip, tables, theme
from mechicl.views.kv_sections import kv_section
from mechicl.views.page import LIMIT_BYTES, Block, block, check_writable, csv_link, environment, provenance_rows, static, themes, write_html
from mechicl.views.traces import trace_sections
from mechicl.views.words import name

__all__ = ["LIMIT_BYTES", "ReportContent", "check_writable", "render_report", "write_report"]


@dataclass(frozen=True, eq=False)
class ReportContent:
    """What goes into a report. `title` stands on top; `command` is the line that makes the report again; `max_prompts` how many prompts are drawn."""

    study: Study
    title: str = ""
    command: str = ""
    max_prompts: int = 2


def write_report(path: str | Path, content: ReportContent) -> Path:
    """Write the report; errors as `page.write_html`.

    Returns:
        Where it was written.
    """
    target = check_writable(path)
    return write_html(target, render_report(content))


def render_report(content: ReportContent) -> str:
    """The report as one HTML string."""
    study = content.study
    title = content.title or f"The in-context-learning circuit of {study.provenance.model} on {study.provenance.task or 'this task'}"
    prompts = study.prompts[: content.max_prompts]
    chosen = _chosen(study)
    views = [_patterns(view, k, chosen) for k, view in enumerate(prompts[:1])]
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title, command=content.command, study=study, headline=story.headline(study), summary=story.summary(study), tiles=story.top_line(study),
            learns=story.learns(study.accuracy), accuracy=_accuracy(study), overview=_overview(study), scores=_scores(study), roles=_roles(study),
            strips=[(strip.strip(view, _groups(study, chosen, view)), f"strip-{k}", [csv_link(f"prompt-{k}", tables.prompt_frame(view))]) for k, view in enumerate(prompts)], badge=story.badge,
            overlays=_overlays(study, prompts), overlay_words=captions.about_overlay(), patterns=[v for v in views if v], sets=_sets(study), effects=_effects(study), growth=_growth(study), trace=trace_sections(study.trace), kv=kv_section(study.kv),
            provenance=_provenance(study), definitions=captions.DEFINITIONS, kinds=theme.ROLE_COLOURS, name=name,
            style=Markup(static("style.css")), script=Markup(static("script.js")), plotly=Markup(plots.javascript()),
            circuitsvis=Markup(attention.library()) if any(views) else "",
            themes=themes(),
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


def _accuracy(study: Study) -> Block:
    a = study.accuracy
    return block(
        "accuracy",
        "",
        plots.plot(a, controls=study.controls),
        captions.about_accuracy(a, study.controls),
        tables.accuracy_frame(a, study.controls),
        raw=a.to_frame(),
    )


def _overview(study: Study) -> Block:
    return block("scores", "", plots.plot(study.scores), captions.about_scores(study), study.scores.to_frame(), with_table=False)


def _scores(study: Study) -> list[Block]:
    frame = study.scores.to_frame()
    again = study.replication.to_frame()
    frame = frame.assign(value_on_other_episodes=again["value"].to_numpy()) if len(again) == len(frame) else frame
    out = []
    first = [s.score for s in study.sets]
    for key, score in sorted(study.scores.scores.items(), key=lambda item: first.index(item[0]) if item[0] in first else len(first)):
        figure = plots.plot(score, n_key_value_heads=study.scores.n_key_value_heads)
        part = frame.loc[frame["score"] == key].sort_values(by="value", ascending=False, kind="stable")
        out.append(block(f"score-{len(out)}", key.replace("_", " "), figure, captions.about_score(score), part))
    return out


def _roles(study: Study) -> Block:
    return block("attention-by-role", "", plots.plot(study.roles), captions.about_roles(study.roles), study.roles.to_frame())


def _sets(study: Study) -> list[dict[str, Any]]:
    out = []
    for k, found in enumerate(study.sets):
        blocks = []
        if found.ablation is not None:
            blocks.append(
                block(
                    f"ablation-{k}", "", plots.plot(found.ablation), captions.about_ablation(found), tables.ablation_frame(found.ablation)
                )
            )
        if found.dose is not None:
            blocks.append(block(f"dose-{k}", "", plots.plot(found.dose), captions.about_dose(found.dose), found.dose.to_frame()))
        out.append({"set": found, "sentence": story.set_sentence(found), "blocks": blocks, "heads": story.heads_in_words(found.heads)})
    return out


def _effects(study: Study) -> Block | None:
    if study.effects is None:
        return None
    figure = plots.plot(study.effects, n_key_value_heads=study.scores.n_key_value_heads)
    frame = replace(study.scores, scores={study.effects.name: study.effects}).to_frame()
    return block(
        "effects",
        "",
        figure,
        captions.about_effects(study.effects, study.n_find),
        frame.sort_values(by="value", ascending=False, kind="stable"),
    )


def _growth(study: Study) -> Block | None:
    if study.growth is None:
        return None
    return block("growth", "", plots.plot(study.growth), captions.about_growth(study.growth), study.growth.to_frame())


def _overlays(study: Study, prompts: tuple[PromptView, ...]) -> list[dict[str, Any]]:
    """The first prompt's pictures under the heads that look at them most; nothing for families without image tokens."""
    own = {h for s in study.sets if s.score == "ila" for h in s.heads}
    out = []
    for view in prompts[:1]:
        if any(view.image_boxes):
            rows = overlay.picture_grid(view, list(view.rows), own_label=own)
            rows.sort(key=lambda row: (-sum(p.share for p in row.pictures), row.head))
            rows = [row for row in rows if row.top >= overlay.FAINT][:6] or rows[:1]
            out.append({"view": view, "rows": rows, "csvs": [csv_link("pictures", tables.overlay_frame(rows))]})
    return out


def _patterns(view: PromptView, k: int, heads: list[tuple[int, int]]) -> dict[str, Any] | None:
    """The token view of circuitsvis for prompts it can carry, a heat map of thinned positions for longer ones."""
    kept = [h for h in heads if h in view.patterns]
    if not kept:
        return None
    if len(view.tokens) <= attention.LONGEST:
        drawn = attention.attention_view(view, kept, element_id=f"patterns-{k}")
        csvs = [csv_link(f"patterns-{k}", tables.pattern_frame(view, drawn.heads, drawn.positions))]
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
            block(
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
    return provenance_rows(study.provenance, ("episodes", f"{study.n_find} to find the heads, {study.n_prove} others to prove them"))
