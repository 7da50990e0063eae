"""The page of a published protocol: its rankings and knock-outs, ours beside them, and the published numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from mechicl.results import DoseCurve, Estimate, HeadScores, ProtocolStudy, PublishedNumber, RankingMatch, Score
from mechicl.results.protocol import spoken
from mechicl.views import captions, plots, tables
from mechicl.views.captions import Words
from mechicl.views.page import Block, block, check_writable, csv_link, environment, provenance_rows, static, themes, write_html
from mechicl.views.protocol import about_knock_outs, about_ranking, about_tuning
from mechicl.views.words import name, significant

TITLES = {"huang2026": "Previous-token and induction heads of a vision-language model: the protocol of Huang et al. 2026"}
MARKS = {
    "file": "read in a file of the authors' code",
    "script": "read off the authors' script",
    "second-hand": "from a summary of the paper, not checked",
}
DEFINITIONS = (
    ("PH, as published", "mean over all positions of the prompt, picture tokens included, of the attention to the token before."),
    (
        "IH, as published",
        "the last token's mean attention to every token of the answer's occurrences in the prompt, minus the mean to all other positions.",
    ),
    ("previous token (ours)", "as PH, over text tokens only: hundreds of picture tokens do not dilute it."),
    ("induction (ours)", "attention to the right labels minus what as many wrong labels get: a head that looks at any label scores zero."),
    ("first token (published accuracy)", "the likeliest next token of the whole vocabulary is the first token of the right label."),
)


def write_protocol_page(path: str | Path, study: ProtocolStudy, *, command: str = "") -> Path:
    """Write the page; errors as `mechicl.views.page.write_html`.

    Args:
        path: Of the file.
        study: What is told.
        command: The line that makes it again.
    """
    return write_html(check_writable(path), render_protocol_page(study, command=command))


def render_protocol_page(study: ProtocolStudy, *, command: str = "") -> str:
    """The page as one HTML string."""
    return (
        environment()
        .get_template("protocol.html.j2")
        .render(
            title=TITLES.get(study.study, study.study), study=study, command=command, tiles=_tiles(study), headline=_headline(study),
            published=_published(study), numbers=[_number_row(n) for n in study.numbers], numbers_csv=[csv_link("published-numbers", _numbers_frame(study))],
            tops=_tops(study), rankings=_rankings(study), agreement=[_ranking(match, k, "agreement") for k, match in enumerate(study.agreement)],
            knock=block("knock-outs", "", plots.plot(study.knock_outs), about_knock_outs(study.knock_outs), study.knock_outs.to_frame()),
            doses=[block(f"dose-{k}", key, plots.plot(d), captions.about_dose(d), d.to_frame()) for k, (key, d) in enumerate(study.doses.items())],
            tuning=_tuning(study), provenance=provenance_rows(study.provenance, ("episodes", f"{study.n_rank} to rank heads, {study.n} others to switch them off on")),
            times=[(part, spoken(s)) for part, s in study.seconds.items()], definitions=(*DEFINITIONS, *captions.DEFINITIONS),
            style=Markup(static("style.css")), script=Markup(static("script.js")), plotly=Markup(plots.javascript()), themes=themes(),
        )
    )  # fmt: skip


def _tiles(study: ProtocolStudy) -> list[tuple[str, str, str]]:
    intact = study.knock_outs.rows[0]
    found = [
        (f"{intact.open.value:.0%}", "right, first token as published", _interval(intact.open)),
        (f"{intact.whole.value:.0%}", "right, whole label", _interval(intact.whole)),
    ]
    for row in study.knock_outs.rows:
        if row.kind == "published":
            found.append(
                (
                    f"{row.open.value:.0%}",
                    f"{row.name} off",
                    f"random heads {row.random_open.value:.0%}" if row.random_open else "no random heads left",
                )
            )
    return found  # fmt: skip


def _interval(e: Estimate) -> str:
    return f"{e.low:.0%} to {e.high:.0%}, n = {e.n}"


def _headline(study: ProtocolStudy) -> tuple[str, bool]:
    """One sentence that the numbers carry, and whether it is a finding."""
    rows = [row for row in study.knock_outs.rows if row.kind == "published" and row.n_draws >= 19]
    hold = [row.name for row in rows if row.p_whole < 0.05 and row.whole_change is not None and row.whole_change.high < 0]
    fail = [row.name for row in rows if row.name not in hold]
    zero = next(row for row in study.knock_outs.rows if row.name == "zero-shot")
    learns = study.knock_outs.rows[0].whole.low > zero.whole.high
    parts = ["The model learns from the examples: " if learns else "That the model learns from the examples is not shown: "]
    parts.append(f"{study.knock_outs.rows[0].whole.value:.0%} of whole labels right against {zero.whole.value:.0%} without examples. ")
    if hold:
        parts.append(
            f"Switching off the {' and the '.join(hold)} costs more than every one of as many random sets but chance allows (p < 0.05). "
        )
    if fail:
        parts.append(f"Not shown to cost more than as many random heads: {', '.join(fail)}. ")
    parts += (
        [sentence for key, curve in study.doses.items() if key.endswith("whole label") and (sentence := _dose_sentence(key, curve))]
        if fail
        else []
    )
    if not rows:
        parts.append("Too few other heads, or draws, for a random control. ")
    return "".join(parts).strip(), bool(learns and hold)


def _dose_sentence(key: str, curve: DoseCurve) -> str:
    """The first dose at which the top heads cost more than every random draw of as many, "" where there is none."""
    for k, accuracy, low, mean in zip(curve.ks, curve.accuracy, curve.random_low, curve.random_mean, strict=True):
        if accuracy.high < low:
            return f"Of {key.split(',')[0]} the first {k} together do (dose curve): {accuracy.value:.0%} of whole labels, random heads {mean:.0%}. "
    return ""


def _published(study: ProtocolStudy) -> list[dict[str, Any]]:
    """The published rankings as tables beside this run's scores."""
    found = []
    for match in study.rankings:
        rows = []
        for k, head in enumerate(match.heads):
            here = ("", "") if not match.comparable else (f"{match.here[k]:.3f}", f"{match.rank[k]:.0f}")
            rows.append((str(k + 1), name(head), f"{match.published[k]:.3f}", *here))
        note = f"Source: {match.source}. " + ("" if match.comparable else f"Not compared: {match.reason}.")
        table = tables.Table(("place", "head", "published", "here", "place here"), tuple(rows), note)
        found.append(
            {
                "kind": match.kind,
                "model": match.model,
                "table": table,
                "match": match,
                "csvs": [csv_link(f"published-{match.kind}", match.to_frame())],
            }
        )
    return found  # fmt: skip


def _number_row(number: PublishedNumber) -> tuple[str, ...]:
    n = "" if number.n is None else f"n = {number.n}"
    here = "" if number.here is None else f"{number.here.value:.3f} ({number.here.low:.3f} to {number.here.high:.3f}), n = {number.here.n}"
    beside = here if number.comparable else (f"{here} (another model)" if here else "")
    return number.name, number.measure, number.model, f"{number.value:.3f} {n}".strip(), beside, MARKS.get(number.mark, number.mark)


def _numbers_frame(study: ProtocolStudy) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"name": n.name, "measure": n.measure, "model": n.model, "published": n.value, "published_n": n.n, "source": n.source, "mark": n.mark,
             "here": np.nan if n.here is None else n.here.value, "low": np.nan if n.here is None else n.here.low, "high": np.nan if n.here is None else n.here.high,
             "comparable": n.comparable}
            for n in study.numbers
        ]
    )  # fmt: skip


def _rankings(study: ProtocolStudy) -> list[Block]:
    """The rankings: the published two and ours two as whole figures, then every score small."""
    frame = study.heads.to_frame()
    found = []
    for key in ("ph_published", "ih_published", "previous_token", "induction"):
        score = study.heads.scores.get(key)
        if score is None or not np.isfinite(score.value).any():
            continue
        part = frame.loc[frame["score"] == key].sort_values(by="value", ascending=False, kind="stable")
        figure = plots.plot(score, n_key_value_heads=study.heads.n_key_value_heads)
        found.append(block(f"score-{key.replace('_', '-')}", key.replace("_", " "), figure, _about_score(score), pd.DataFrame(part)))
    by_reader = {key: score for key, score in study.heads.scores.items() if key.startswith("ph[") or key == "ph_published"}
    small = replace(study.heads, scores=by_reader)
    found.append(block("ph-by-reader", "PH by what reads", plots.plot(small), _about_readers(small), small.to_frame(), with_table=False))
    rest = replace(study.heads, scores={k: s for k, s in study.heads.scores.items() if k not in by_reader})
    found.append(block("scores", "every other score", plots.plot(rest), _about_all(rest), rest.to_frame(), with_table=False))
    return found


def _about_score(score: Score) -> Words:
    if np.isfinite(score.p).any():
        return captions.about_score(score)
    best = score.top(1)[0]
    return Words(
        f"{score.description[:1].upper()}{score.description[1:]}, for every head; right: the top heads with intervals.",
        "Published without a null: any head that looks nearby scores, and rows of picture tokens, which are most of a prompt, decide. Read the text rows beside it.",
        f"Best: head {name(best)}, {score.value[best]:.3f} ({score.low[best]:.3f} to {score.high[best]:.3f}), n = {score.per_episode.shape[0]} prompts.",
    )


def _about_readers(scores: HeadScores) -> Words:
    return Words(
        "The published previous-token score taken apart by the tokens that read: pictures, labels, questions, instruction, template. The first map is all of them together.",
        "Neighbours in a picture's raster are neighbours in the picture too: a high score of picture rows need not be a previous-token head of language.",
        f"n = {scores.n} prompts; no null: text rows have one as 'previous token'.",
    )


def _about_all(scores: HeadScores) -> Words:
    passed = ", ".join(f"{key.replace('_', ' ')} {len(significant(s))}" for key, s in scores.scores.items() if np.isfinite(s.p).any())
    return Words(
        "The published induction score and ours on one scale. Dots: heads above their null (labels shuffled over the exemplars, or other places).",
        "A score says where a head looks, not what it does there.",
        f"n = {scores.n} prompts; heads above their null, Holm-corrected: {passed}.",
    )


def _tops(study: ProtocolStudy) -> tables.Table:
    """The heads that each ranking puts first."""
    keys = [key for key in ("ph_published", "previous_token", "ih_published", "induction", "induction_label") if key in study.heads.scores]
    tops = {key: study.heads.top(key, 10) for key in keys}
    rows = []
    for place in range(max(len(some) for some in tops.values())):
        cells = [
            f"{name(some[place])}  {study.heads[key].value[some[place]]:.3f}" if place < len(some) else "" for key, some in tops.items()
        ]
        rows.append((str(place + 1), *cells))
    return tables.Table(("place", *(key.replace("_", " ") for key in keys)), tuple(rows))


def _ranking(match: RankingMatch, k: int, what: str) -> Block:
    return block(f"{what}-{k}", "", plots.plot(match), about_ranking(match), match.to_frame())


def _tuning(study: ProtocolStudy) -> list[Block]:
    if study.tuning is None:
        return []
    found = study.tuning
    steps = pd.DataFrame({"step": np.arange(1, len(found.loss) + 1), "loss": found.loss})
    return [
        block("tuning", "", plots.plot(found), about_tuning(found), found.to_frame(), raw=steps),
        block("tuning-heads", "", plots.plot(found.curves), captions.about_growth(found.curves), found.curves.to_frame()),
        block("tuning-growth", "", plots.plot(found.growth), captions.about_growth(found.growth), found.growth.to_frame()),
    ]
