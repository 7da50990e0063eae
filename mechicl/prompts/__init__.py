"""Episodes, their tokens, and what every token is for.

`episode` is the unit, `render` turns it into tokens with exact spans, `batch` carries them, `align` and `corrupt` make pairs of prompts. Processors and tokenizers are known here, models are not.
"""
