"""Many paths -> few patterns that match exactly these."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain, groupby, takewhile
from itertools import product as each_of
from typing import Any

Segment = str | int  # an int is an index of a list, and a str is no index
Product = tuple[tuple[Segment, ...], ...]  # the choices for each segment of a path

_INDEX = re.compile(r"0|[1-9][0-9]{0,17}")
_WIDEST = 48  # of what stands for one segment
_WORD = re.compile(r"[^\W\d_]+|[0-9]+|.", re.DOTALL)


# A *product* has some choices for each segment of a path, and represents every path that takes
# one choice from each: `(layers) (0, 1, 2) (q_proj, v_proj)` represents six. The invariant: all
# products together represent exactly the paths that were given. A line of a report starts with a
# pattern made of a product, and whoever copies it must select those places and no others.
#
# That is why `_merged` unites two products only if they are equal in all segments but one:
# `(0) (q, v)` and `(1) (q, v)` are `(0, 1) (q, v)`. But `(0) (q, v)` and `(1) (q)` stay two, since
# `(0, 1) (q, v)` would also represent `(1) (v)`, a place that did not change. `fold` divides again
# what would be too long to print, and its paths with it, so that each product keeps just its own.


def fold(paths: Sequence[Sequence[Segment]]) -> Iterator[tuple[Product, list[int]]]:
    """Fold paths into few products.

    Yields:
        A product, and the numbers of the paths that it stands for, in their order.
    """
    by_length: dict[int, dict[Product, list[int]]] = {}
    for number, path in enumerate(paths):
        product = tuple((segment,) for segment in path)
        by_length.setdefault(len(path), {}).setdefault(product, []).append(number)
    merged = chain.from_iterable(_merged(some).items() for some in by_length.values())
    for product, numbers in sorted(merged, key=lambda item: min(item[1])):
        choices = list(map(_narrowed, product))
        choice_of = [{name: choice for choice in some for name in choice} for some in choices]
        parts: dict[Product, list[int]] = {part: [] for part in each_of(*choices)}
        for number in sorted(numbers):
            parts[tuple(map(dict.__getitem__, choice_of, paths[number]))].append(number)
        yield from parts.items()


def _merged(products: dict[Product, list[int]]) -> dict[Product, list[int]]:
    """Few products for many of one length."""
    for at in range(len(next(iter(products)))):
        if len(products) == 1:
            break
        alike: dict[Any, list[Product]] = {}
        for product in products:
            key = product
            if _is_plain(product[at]):
                key = product[:at], product[at + 1 :], type(product[at][0])
            alike.setdefault(key, []).append(product)
        folded: dict[Product, list[int]] = {}
        for group in alike.values():
            first = group[0]
            choice = tuple(name for product in group for name in product[at])
            numbers = [number for product in group for number in products[product]]
            folded[(*first[:at], choice, *first[at + 1 :])] = numbers
        products = folded
    return products


def _narrowed(choice: tuple[Segment, ...]) -> list[tuple[Segment, ...]]:
    """The choices to make of one, so that each of them is written in few characters."""
    if len(_written(choice)) <= _WIDEST:
        return [choice]
    long_runs: list[tuple[Segment, ...]] = []
    others: list[tuple[Segment, ...]] = [()]
    for run in _runs(choice):
        if len(run) > 2:
            long_runs.append(run)
            continue
        for segment in run:
            if len(_written((*others[-1], segment))) > _WIDEST:
                others.append(())
            others[-1] += (segment,)
    return [*long_runs, *filter(None, others)]


def _runs(choice: tuple[Any, ...]) -> Iterator[tuple[Segment, ...]]:
    """Indices in a row, as long as they go; a name is a run of its own."""
    if isinstance(choice[0], str):
        yield from ((name,) for name in choice)
    else:
        for _, run in groupby(enumerate(sorted(choice)), lambda item: item[1] - item[0]):
            yield tuple(index for _, index in run)


def segments(path: str, *, slices: bool) -> list[Segment]:
    """The segments of a path, in which with ``slices`` every number is an index of a list."""
    parts = path.split(".")
    return [int(part) if slices and _INDEX.fullmatch(part) else part for part in parts]


def pattern_of(product: Product) -> str:
    """The pattern that matches the paths of a product, as one writes it in Python."""
    if not is_plain(product):
        return f"re.compile({_regex_of(product)!r})"
    return "".join(map(_written, product)).removeprefix(".")


def _written(choice: tuple[Segment, ...]) -> str:
    if isinstance(choice[0], int):
        return _subscript(sorted(map(int, choice)))
    return f".{_braces([str(name) for name in choice])}"


def is_plain(product: Product) -> bool:
    """Whether a pattern without a regular expression can match exactly its paths."""
    return all(map(_is_plain, product))


def _is_plain(choice: tuple[Segment, ...]) -> bool:
    return isinstance(choice[0], int) or not any(
        not name or re.search(r"[*?\[\]{},]", name) or not name.isprintable()
        for name in map(str, choice)
    )


def _regex_of(product: Product) -> str:
    choices = ["|".join(re.escape(str(name)) for name in choice) for choice in product]
    return r"\.".join(f"({text})" if "|" in text else text for text in choices)


def _subscript(indices: list[int]) -> str:
    """``[0, 1, 2]`` -> ``'[0:3]'``; what is no slice stays a choice of names."""
    if len(indices) == 1:
        return f".{indices[0]}"
    first, last, step = indices[0], indices[-1], indices[1] - indices[0]
    if indices != list(range(first, last + 1, step)) or (step > 1 and len(indices) == 2):
        return ".{" + ",".join(map(str, indices)) + "}"
    return f"[{first}:{last + 1}]" if step == 1 else f"[{first}:{last + 1}:{step}]"


def _braces(names: list[str]) -> str:
    """``['q_proj', 'v_proj']`` -> ``'{q,v}_proj'``."""
    if len(names) == 1:
        return names[0]
    words = [_WORD.findall(name) for name in names]
    head = _common(words)
    tail = _common([own[:head:-1] for own in words])  # leaves each of them a word
    if head and head == min(map(len, words)):
        head -= 1
    start = "".join(words[0][:head])
    end = "".join(words[0][len(words[0]) - tail :])
    return f"{start}{{{','.join(name[len(start) : len(name) - len(end)] for name in names)}}}{end}"


def _common(words: list[list[str]]) -> int:
    """How many words all of them begin with."""
    return len(list(takewhile(lambda same: len(set(same)) == 1, zip(*words))))
