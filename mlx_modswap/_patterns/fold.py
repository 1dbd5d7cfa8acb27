"""Fold many paths into few patterns that match exactly these paths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby, takewhile
from itertools import product as combinations
from typing import Any

from .parse import Pattern

Segment = str | int  # an int is an index of a list, a str is not
Choice = tuple[Segment, ...]  # of segments at one level
Product = tuple[Choice, ...]  # represents every path that takes one segment of each choice

_INDEX = re.compile(r"0|[1-9][0-9]{0,17}")
_WIDEST = 48  # characters for one choice
# Blanks are inside words, since an alternative in braces must not start or end with one.
_WORD = re.compile(r"(?:[^\W\d_]+|[0-9]+|\S)(?:\s+(?:[^\W\d_]+|[0-9]+|\S))*")


# A *product* has some choices for each segment of a path, and represents every path that takes
# one choice from each: `(layers) (0, 1, 2) (q_proj, v_proj)` represents six. The invariant: all
# products together represent exactly the paths that were given. A line of a report starts with a
# pattern made of a product, and a user who copies it must select those places and no others.
#
# That is why `_merged` merges two products only if they are equal in all segments but one:
# `(0) (q, v)` and `(1) (q, v)` become `(0, 1) (q, v)`. But `(0) (q, v)` and `(1) (q)` stay two,
# since `(0, 1) (q, v)` would also represent `(1) (v)`, a place that did not change. `fold` splits a
# product that would be too long to print, and gives each part the paths that it represents.


def fold(paths: Sequence[Sequence[Segment]]) -> Iterator[tuple[Product, list[int]]]:
    """Fold paths into few products that represent these paths and no others.

    Yields:
        A product, and the positions of its paths in ``paths``, in ascending order.
    """
    by_length: dict[int, dict[Product, list[int]]] = {}
    for position, path in enumerate(paths):
        product = tuple((segment,) for segment in path)
        by_length.setdefault(len(path), {}).setdefault(product, []).append(position)
    merged = chain.from_iterable(_merged(some).items() for some in by_length.values())
    for product, positions in sorted(merged, key=lambda item: min(item[1])):
        choices = list(map(_split, product))
        part_of = [{segment: part for part in parts for segment in part} for parts in choices]
        narrow: dict[Product, list[int]] = {parts: [] for parts in combinations(*choices)}
        for position in sorted(positions):
            narrow[tuple(map(dict.__getitem__, part_of, paths[position]))].append(position)
        yield from narrow.items()


def _merged(products: dict[Product, list[int]]) -> dict[Product, list[int]]:
    """Merge products of one length, given with the positions of their paths.

    Each path is in exactly one product, and every combination of the choices of a
    product is a path that was given: this holds for single paths, and each merge
    keeps it. Products that are equal at all levels but one can be merged, since the
    union of their choices at that level adds no other combination. Products that
    differ at two levels cannot: ``a.0.q`` and ``a.1.k`` would become
    ``a[0:2].{q,k}``, which matches ``a.0.k`` as well. So the loop goes over the levels
    from left to right, and at each level groups the products that are equal at all
    other levels. This takes linear time; a search for pairs to merge would take
    quadratic time. An index and a name never share a choice, and a name that only a
    regular expression can match is never merged.
    """
    for level in range(len(next(iter(products)))):
        if len(products) == 1:
            break
        groups: dict[Any, list[Product]] = {}
        for product in products:
            key = product
            if _is_plain(product[level]):
                key = product[:level], product[level + 1 :], type(product[level][0])
            groups.setdefault(key, []).append(product)
        folded: dict[Product, list[int]] = {}
        for group in groups.values():
            first = group[0]
            choice = tuple(segment for product in group for segment in product[level])
            positions = [position for product in group for position in products[product]]
            folded[(*first[:level], choice, *first[level + 1 :])] = positions
        products = folded
    return products


def _split(choice: Choice) -> list[Choice]:
    """Split a choice whose text is too wide; long runs of indices stay whole, as slices."""
    if len(_text_of(choice)) <= _WIDEST:
        return [choice]
    long_runs: list[Choice] = []
    others: list[Choice] = [()]
    for run in _runs(choice):
        if len(run) > 2:
            long_runs.append(run)
            continue
        for segment in run:
            if len(_text_of((*others[-1], segment))) > _WIDEST:
                others.append(())
            others[-1] += (segment,)
    return [*long_runs, *filter(None, others)]


def _runs(choice: tuple[Any, ...]) -> Iterator[Choice]:
    """Yield the runs of consecutive indices of a choice; each name is a run of its own."""
    if isinstance(choice[0], str):
        yield from ((name,) for name in choice)
    else:
        for _, run in groupby(enumerate(sorted(choice)), lambda item: item[1] - item[0]):
            yield tuple(index for _, index in run)


def segments(path: str, *, numbers_are_indices: bool) -> list[Segment]:
    """Split a path into segments; with ``numbers_are_indices``, each number is an index of a list.

    The first segment is a key of the model, which is not a list.
    """
    first, *parts = path.split(".")
    if not numbers_are_indices:
        return [first, *parts]
    return [first, *(int(part) if _INDEX.fullmatch(part) else part for part in parts)]


def folded(paths: Iterable[str], *, numbers_are_indices: bool) -> list[str]:
    """Fold paths into the texts of few patterns: ``['model.layers[0:4].mlp.up_proj']``."""
    split = [segments(path, numbers_are_indices=numbers_are_indices) for path in paths]
    return [pattern_of(product) for product, _ in fold(split)]


# ---------------------------------------------------------------- products as patterns


def pattern_of(product: Product) -> str:
    """Return the pattern that matches the paths of a product, as text."""
    return as_text(selector_of(product))


def selector_of(product: Product) -> Pattern:
    """Return the pattern that matches the paths of a product, as ``select`` takes it."""
    if is_plain(product):
        return "".join(map(_text_of, product)).removeprefix(".")
    return re.compile(_regex_of(product))


def as_text(pattern: Pattern) -> str:
    """Return a pattern as text; the ``repr`` of a long regular expression would be cut."""
    return pattern if isinstance(pattern, str) else f"re.compile({pattern.pattern!r})"


def is_plain(product: Product) -> bool:
    """Return whether a pattern that is a ``str`` can match exactly the paths of a product."""
    return all(map(_is_plain, product))


def _is_plain(choice: Choice) -> bool:
    return isinstance(choice[0], int) or not any(
        not name
        or re.search(r"[*?\[\]{},]", name)
        or name != name.strip(" ")
        or not name.isprintable()
        for name in map(str, choice)
    )


def _regex_of(product: Product) -> str:
    choices = ["|".join(re.escape(str(name)) for name in choice) for choice in product]
    return r"\.".join(f"({text})" if "|" in text else text for text in choices)


def _text_of(choice: Choice) -> str:
    if isinstance(choice[0], int):
        return _subscript(sorted(map(int, choice)))
    return f".{_braces([str(name) for name in choice])}"


def _subscript(indices: list[int]) -> str:
    """Write ``[0, 1, 2]`` as ``'[0:3]'``; indices that form no slice are as_text in braces."""
    if len(indices) == 1:
        return f".{indices[0]}"
    first, last, step = indices[0], indices[-1], indices[1] - indices[0]
    if indices != list(range(first, last + 1, step)) or (step > 1 and len(indices) == 2):
        return ".{" + ",".join(map(str, indices)) + "}"
    return f"[{first}:{last + 1}]" if step == 1 else f"[{first}:{last + 1}:{step}]"


def _braces(names: list[str]) -> str:
    """Write ``['q_proj', 'v_proj']`` as ``'{q,v}_proj'``."""
    if len(names) == 1:
        return names[0]
    words = [_WORD.findall(name) for name in names]
    head = _common(words)
    tail = _common([name[:head:-1] for name in words])  # leaves a word of each name
    if head and head == min(map(len, words)):
        head -= 1
    start = "".join(words[0][:head])
    end = "".join(words[0][len(words[0]) - tail :])
    return f"{start}{{{','.join(name[len(start) : len(name) - len(end)] for name in names)}}}{end}"


def _common(words: list[list[str]]) -> int:
    """Return how many words all of the lists have in common at the beginning."""
    return len(list(takewhile(lambda same: len(set(same)) == 1, zip(*words))))
