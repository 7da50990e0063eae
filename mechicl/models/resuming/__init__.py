"""Many variations of one recorded run, each resumed where it differs. What to vary, and what it means, is decided in `analysis`."""
