"""Files, suggestions, errors and command lines: what every other part may import, without torch."""
