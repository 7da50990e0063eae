"""What is lost without heads, or without one group of tokens reading another: interventions that take away, with matched random controls."""
