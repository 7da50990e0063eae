"""Where episodes come from: procedural concepts, real digits, pseudo-words, vectors, published sets in local folders, a user's own pictures.

Everything drawn follows from a seed; everything read is checked first. Nothing here knows a tokenizer or a model.
"""
