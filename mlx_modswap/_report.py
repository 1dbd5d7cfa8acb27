"""What a swap has changed, and its folded picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from html import escape

import mlx.core as mx
import mlx.nn as nn

from ._fold import fold, pattern_of, segments
from ._measure import Measure, measure, record, total

_MOST_LINES = 100


class Replacement(Mapping[str, nn.Module]):
    """What a swap has changed: a mapping of path to *new* module, in definition order.

    Only the places that changed are in it, and no replaced module is kept alive
    by it. ``str()`` of it is a folded picture, whose places are themselves
    patterns that select exactly these places::

        model.layers[0:32].self_attn.{q,v}_proj   Linear -> LoRALinear   x64   ...

    A notebook shows it as a table.
    """

    def __init__(
        self,
        paths: Sequence[str],
        olds: Sequence[nn.Module],
        news: Sequence[nn.Module],
        rules: Sequence[int],
        slices: bool,
    ):
        self._paths = paths
        self._news = news
        self._olds = record(olds)
        self._rules = rules
        self._slices = slices  # whether every number in a path is an index of a list

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(zip(self._paths, self._news))

    def __getitem__(self, path: str) -> nn.Module:
        return self._modules[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __repr__(self) -> str:
        return f"<Replacement of {len(self)} modules>"

    def __str__(self) -> str:
        if not self:
            return "nothing changed"
        rows = self._rows()
        return "\n".join(aligned(rows[:_MOST_LINES])) + _rest(rows, "\n{}")

    def _repr_html_(self) -> str:
        if not self:
            return "<p>nothing changed</p>"
        rows = self._rows()
        columns = [column for column in zip(*rows[:_MOST_LINES]) if any(column)]
        cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in zip(*columns))
        table = "".join(f"<tr>{row}</tr>" for row in cells)
        return f"<table>{table}</table>" + _rest(rows, "<p>{}</p>")

    def _rows(self) -> list[list[str]]:
        olds, news = self._olds(), measure(list(self.values()))
        paths = [segments(path, slices=self._slices) for path in self]
        alike: dict[tuple[object, ...], list[int]] = {}
        for at, (old, new) in enumerate(zip(olds, news)):
            alike.setdefault((old.name, new.name, old.dtypes, new.dtypes), []).append(at)
        rows: list[list[str]] = []
        for places in alike.values():
            for product, numbers in fold([paths[at] for at in places]):
                inside = [places[number] for number in numbers]
                old, new = (total(m[at] for at in inside) for m in (olds, news))
                rows.append([pattern_of(product), *_changes(old, new, len(inside))])
        return rows


def _rest(rows: list[list[str]], text: str) -> str:
    more = len(rows) - _MOST_LINES
    return text.format(f"... {more} more") if more > 0 else ""


def _changes(old: Measure, new: Measure, count: int) -> list[str]:
    params = _change(old.params, new.params, number)
    trainable = _change(old.trainable, new.trainable, number)
    # All parameters are trainable by default, and those of a quantized layer never are.
    is_usual = old.trainable == old.params and (trainable == params or "(bits=" in new.name)
    return [
        _arrow(old.name, new.name),
        f"x{count}",
        f"{params} params" if old.params or new.params else "",
        f"{trainable} trainable" if old.trainable != new.trainable and not is_usual else "",
        _change(old.nbytes, new.nbytes, size) if old.nbytes or new.nbytes else "",
        _arrow(dtypes(old.dtypes), dtypes(new.dtypes)) if old.dtypes or new.dtypes else "",
    ]


def _change(before: int, after: int, text: Callable[[int], str]) -> str:
    """``4000, 0`` -> ``'4.0K -> 0'``, and ``8000000, 8000012`` -> ``'8.0M + 12'``."""
    if before != after and text(before) == text(after):
        return f"{text(before)} {'+' if after > before else '-'} {text(abs(after - before))}"
    return _arrow(text(before), text(after))


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


# ---------------------------------------------------------------- words for numbers


def number(count: int) -> str:
    """``2100000`` -> ``'2.1M'``."""
    return _scaled(count, ("", "K", "M", "B", "T"))


def size(nbytes: int) -> str:
    """``2100000`` -> ``'2.1 MB'``."""
    return _scaled(nbytes, (" B", " KB", " MB", " GB", " TB"))


def _scaled(count: int, units: tuple[str, ...]) -> str:
    power = 0
    while power < len(units) - 1 and count >= 999.95 * 1000**power:
        power += 1
    return f"{count / 1000**power:.1f}{units[power]}" if power else f"{count}{units[0]}"


def dtypes(of: Iterable[mx.Dtype]) -> str:
    """What to call some dtypes."""
    return ", ".join(sorted(str(one).removeprefix("mlx.core.") for one in of)) or "no arrays"


def aligned(rows: list[list[str]]) -> list[str]:
    """One line for each row, in columns; those that are empty are left out."""
    columns = [column for column in zip(*rows) if any(column)]
    widths = [max(map(len, column)) for column in columns]
    return ["   ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns)]
