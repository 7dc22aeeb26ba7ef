"""`python -m tracemw` is the command `tracemw`."""

from __future__ import annotations

from tracemw.cli import main

main()
