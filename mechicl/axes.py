"""The names of axes, everywhere the same. A result's `axes` field uses these words and no others.

batch    an episode of the batch
pos      a token position of the prompt, padding included
layer    a decoder layer, 0 = first
head     an attention (query) head; `kv_head` where grouped-query attention has fewer
dest     the position that reads (query side of attention)
src      the position that is read (key side of attention)
d_model  the residual stream's width
d_head   a head's width
vocab    a token of the vocabulary
item     an exemplar of the prompt, label a candidate label, shot an example turn, span a labelled stretch of tokens
patch    an image patch; seed, step, draw: repetitions of a run, of training, of a random control
"""

from typing import Literal, get_args

Axis = Literal[
    "batch", "pos", "layer", "head", "kv_head", "dest", "src", "d_model", "d_head", "vocab", "item", "label", "patch", "seed",
    "step", "shot", "span", "draw",
]  # fmt: skip

AXES: tuple[str, ...] = get_args(Axis)
