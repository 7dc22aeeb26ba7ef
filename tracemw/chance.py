"""Random bits: our own, so that an application that seeds `random` does not make our ids repeat.

A forked process goes on with others than its parent: alike, they would give the same ids and decide alike.
"""

from __future__ import annotations

import os
from random import Random
from typing import Final

chance: Final = Random()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=chance.seed)
