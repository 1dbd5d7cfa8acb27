"""Texts without downloads: Python's help, docstrings, and what a model writes itself."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import mlx.core as mx

LONG = 40  # characters of a line, from which on it is not a common phrase


class Help(NamedTuple):
    """Disjoint parts of Python's help, each an array of sequences x length."""

    train: mx.array
    held_out: mx.array
    judged: mx.array


def python_help(tokenizer: Any, train: int, judged: int, length: int) -> Help:
    """Read Python's help: the first half to train on, with each eighth sequence held out.

    Args:
        tokenizer (Any): The tokenizer of the model.
        train (int): How many tokens of the first half are read, at most.
        judged (int): How many tokens of the second half are judged, evenly spread.
        length (int): How many tokens a sequence has.
    """
    ids = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)), verbose=False)
    middle = len(ids) // 2
    first = cut(ids[: min(train, middle)], length)
    count = max(1, judged // length)
    step = (len(ids) - middle) // count
    starts = [middle + at * step for at in range(count)]
    return Help(
        mx.concatenate([first[at::8] for at in range(1, 8)]),
        first[::8],
        mx.array([ids[start : start + length] for start in starts]),
    )


def docstrings(tokenizer: Any, tokens: int, length: int) -> mx.array:
    """Read docstrings of Python's library, in random order, without lines that its help has."""
    known = {line.strip() for topic in topics.values() for line in topic.splitlines()}
    ids: list[int] = []
    for text in all_docstrings():
        if len(ids) >= tokens:
            break
        if not any(line.strip() in known for line in text.splitlines() if len(line) > LONG):
            ids += tokenizer.encode(text + "\n\n", verbose=False)
    return cut(ids[:tokens], length)


def all_docstrings() -> Iterator[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    random.Random(0).shuffle(files)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in files:
        if {"site-packages", "dist-packages", "pydoc_data", "test", "tests"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # a file that is there to be wrong
            continue
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        yield "\n\n".join(text for text in found if text)


def cut(ids: list[int], length: int) -> mx.array:
    return mx.array(ids[: len(ids) // length * length]).reshape(-1, length)
