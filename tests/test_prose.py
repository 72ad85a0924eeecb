"""Docstrings and comments are whole sentences that explain themselves (CONTRIBUTING.md has the rules)."""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from retinue.utils.paths import PROJECT

# A docstring or comment that begins with one of these words is a fragment, or hides what it is about.
FRAGMENT = re.compile(r"(Of|Those|That|As|By|What|Whether|Where|Until)\b", re.IGNORECASE)
PRAGMA = re.compile(r"noqa|pyright|type:|fmt:|ruff")
SHAPE = ("(", "[")
# Longest trailing comment in words: a unit or a shape. Everything longer stands on a line of its own.
TRAILING_WORDS = 4


def docstring_faults(source: str) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and (text := ast.get_docstring(node)) and FRAGMENT.match(text):
            yield f"line {node.body[0].lineno}: the docstring begins with {text.split()[0]!r}"


def comment_faults(source: str) -> Iterator[str]:
    # Line of the previous comment if that comment stands alone on its line, else None.
    previous_line = None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text = token.string.lstrip("#: ")
        if token.type != tokenize.COMMENT or PRAGMA.match(text):
            continue
        line, trailing = token.start[0], not token.line.lstrip().startswith("#")
        continues = previous_line == line - 1 and not trailing
        if FRAGMENT.match(text) and not continues:
            yield f"line {line}: the comment begins with {text.split()[0]!r}"
        if trailing and len(text.split()) > TRAILING_WORDS and not text.startswith(SHAPE):
            yield f"line {line}: the trailing comment has {len(text.split())} words; put it on the line above"
        previous_line = None if trailing else line


def faults(source: str) -> list[str]:
    return [*docstring_faults(source), *comment_faults(source)]


def yaml_faults(source: str) -> list[str]:
    comments = [line.partition("#")[2].strip() for line in source.splitlines() if re.search(r"(^|\s)#", line)]
    return [comment for comment in comments if re.match(FRAGMENT.pattern, comment)]


def tracked(pattern: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", pattern], cwd=PROJECT, capture_output=True, text=True
    )
    return [path for name in listed.stdout.splitlines() if (path := PROJECT / name).exists()]


@pytest.mark.parametrize("path", tracked("*.py"), ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_docstrings_and_comments_are_sentences(path: Path):
    assert faults(path.read_text(encoding="utf-8")) == []


def test_comments_in_the_config_are_sentences():
    found = {path.name: yaml_faults(path.read_text(encoding="utf-8")) for path in tracked("conf/*.yaml")}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "planted",
    [
        '"""Of this process among those of its run."""',
        'def f():\n    """Whether it is so."""',
        "# of the map\nx = 1",
        "x = 1  # until the other comes back from there",
    ],
)
def test_a_fragment_is_found(planted: str):
    assert len(faults(planted)) >= 1


def test_sentences_and_shapes_pass():
    assert not faults('"""Return the map."""\nx = y  # (B, H, W, C) in float32, channels last\nz = 1  # MiB\n')
    assert not faults("# The map is padded\n# as the paper does.\nx = 1  # noqa: E501 - of no use to anyone here\n")
