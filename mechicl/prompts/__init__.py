"""Episodes, their tokens, and what every token is for."""
