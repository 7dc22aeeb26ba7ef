"""Which paths are not traced: patterns in which `*` stands for any text, each for the whole path.

No regular expressions: with several `*` those try ever more ways to share out a path that its sender has chosen.
"""

from __future__ import annotations

from collections.abc import Sequence


class Exclusion:
    """Paths by patterns; made once from the settings, asked with every request.

    Args:
        patterns: Whole paths, with `*` for any text: `/health`, `/static/*`.
    """

    __slots__ = ("_paths", "_beginnings", "_globs")

    def __init__(self, patterns: Sequence[str]) -> None:
        self._paths = frozenset(pattern for pattern in patterns if "*" not in pattern)
        globs = [pattern.split("*") for pattern in patterns if "*" in pattern]
        self._beginnings = tuple(glob[0] for glob in globs if glob[1:] == [""])  # `/static/*`, as most of them are
        self._globs = tuple(glob for glob in globs if glob[1:] != [""])

    def covers(self, path: str) -> bool:
        """Say whether a path is excluded."""
        if path in self._paths or path.startswith(self._beginnings):
            return True
        return bool(self._globs) and any(_matches(path, glob) for glob in self._globs)


def _matches(path: str, glob: list[str]) -> bool:
    """Take each piece between the `*` where it comes first: no other place would leave more for the next ones."""
    first, last = glob[0], glob[-1]
    position, end = len(first), len(path) - len(last)
    if position > end or not path.startswith(first) or not path.endswith(last):
        return False
    for piece in glob[1:-1]:
        found = path.find(piece, position, end)
        if found < 0:
            return False
        position = found + len(piece)
    return True
