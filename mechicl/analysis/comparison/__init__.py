"""Two models side by side, or one along its checkpoints: heads matched by place or by function, shared tops against chance, accuracy paired, claims about size."""

from mechicl.analysis.comparison.words import in_words

__all__ = ["in_words"]
