"""Suggestions for mistyped names."""

import difflib
from collections.abc import Iterable


def nearest(word: str, words: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the one of `words` that is nearest to `word`, or "" if none is near."""
    matches = difflib.get_close_matches(word, list(words), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""
