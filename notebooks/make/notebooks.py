"""Write the notebooks of the claims, 02 to 07, and of causes, 08 to 10: python notebooks/make/notebooks.py

A notebook is a list of cells below: text that starts with "# ", "## " or plain words is Markdown, what starts with ">>>" is code. Outputs are not kept.
"""

from __future__ import annotations

from pathlib import Path

import answers
import changes
import links
import nbformat
import odds
from claims_one_modality import DECODER_SCALE, ICL_AGAINST_WEIGHTS, ROPE
from claims_two_modalities import KNOCK_OUTS, MEASURES, MODALITIES

NOTEBOOKS = {
    "02_icl_against_in_weights": ICL_AGAINST_WEIGHTS,
    "03_does_rope_raise_the_threshold": ROPE,
    "04_modality_asymmetry": MODALITIES,
    "05_knock_outs": KNOCK_OUTS,
    "06_decoder_scale": DECODER_SCALE,
    "07_which_measure_predicts_icl": MEASURES,
    "08_how_does_the_answer_get_to_the_query": answers.VLM,
    "09_the_same_calls_on_a_trained_toy": answers.TOY,
    "10_what_does_an_example_change": changes.CHANGE,
    "11_built_or_sharpened": links.LINK,
    "12_induction_or_function_vector_heads": odds.ODDS,
    "13_is_it_the_same_in_nnsight": odds.NNSIGHT,
}
SETUPS = {
    "11_built_or_sharpened": links.SETUP,
    "12_induction_or_function_vector_heads": odds.ODDS_SETUP,
    "13_is_it_the_same_in_nnsight": odds.NNSIGHT_SETUP,
}
"""Of notebooks that begin in their own way."""
SETUP = """>>>
import os
from pathlib import Path

import pandas as pd

from mechicl.analysis.trainings import bands, change_points, claims
from mechicl.views.plots import plot, plot_sweep

figures = Path(os.environ.get("MECHICL_FIGURES", "../figures"))
results = Path(os.environ.get("MECHICL_RESULTS", "results"))"""


def cell(text: str, number: int) -> nbformat.NotebookNode:
    """One cell, with a name that does not change from one writing to the next."""
    code = text.startswith(">>>")
    made = nbformat.v4.new_code_cell(text[3:].strip()) if code else nbformat.v4.new_markdown_cell(text.strip())
    made["id"] = f"cell-{number:02d}"
    return made


def books() -> dict[str, nbformat.NotebookNode]:
    """Every notebook by its name."""
    out = {}
    for name, texts in NOTEBOOKS.items():
        setup = (
            answers.SETUP if texts in (answers.VLM, answers.TOY) else changes.SETUP if texts is changes.CHANGE else SETUPS.get(name, SETUP)
        )
        texts = [text.replace("NAME", name) for text in (texts[0], setup, *texts[1:])]
        book = nbformat.v4.new_notebook(
            cells=[cell(text, i) for i, text in enumerate(texts)],
            metadata={
                "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                "language_info": {"name": "python"},
            },
        )
        book["nbformat_minor"] = 5
        nbformat.validate(book)
        out[name] = book
    return out


def main() -> None:
    """Write them all."""
    for name, book in books().items():
        nbformat.write(book, Path(__file__).parent.parent / f"{name}.ipynb")


if __name__ == "__main__":
    main()
