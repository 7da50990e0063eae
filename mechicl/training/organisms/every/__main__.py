"""`python -m mechicl.training.organisms.every docs/families.md`: write the table of families into the page (a minute)."""

from __future__ import annotations

import sys

from mechicl.training.organisms.every.table import table, write

if len(sys.argv) > 1:
    write(sys.argv[1])
else:
    sys.stdout.write(table() + "\n")
