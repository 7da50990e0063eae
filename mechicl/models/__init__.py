"""Hooked models behind one interface: batches go in, logits go out, and every step between has TransformerLens' name.

`hooked` is the interface; `vlm` and `text` wrap Hugging Face models, `toys` holds our own; `load` opens them, `families` describes them, `rows` reads attention without whole
patterns, `resuming` runs many variations of one run. Knows prompts and their batches. No measure, no training and no figure lives here.
"""
