"""The report of a swap: what has changed, folded into a few lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from html import escape
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .._patterns.fold import as_text, fold, segments, selector_of
from .._patterns.parse import Pattern
from .._words import aligned, class_names, dtypes, listed, number, size
from .measure import Measure, measure, record, total

_MOST_LINES = 100


class Change(NamedTuple):
    """A line of a :class:`Replacement`: places that changed in the same way.

    Attributes:
        pattern (Pattern): The pattern with which ``select`` finds the places.
        old (str): The class of the old modules, as printed.
        new (str): The class of the new modules, as printed.
        count (int): The number of places.
        old_params (int): The parameters of all old modules together, before quantization.
        new_params (int): The parameters of all new modules together, before quantization.
        old_nbytes (int): The size of the arrays of all old modules, in bytes.
        new_nbytes (int): The size of the arrays of all new modules, in bytes.
        old_dtypes (frozenset[mx.Dtype]): The dtypes of the arrays of the old modules.
        new_dtypes (frozenset[mx.Dtype]): The dtypes of the arrays of the new modules.
    """

    pattern: Pattern
    old: str
    new: str
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]  # hides `tuple.count`
    old_params: int
    new_params: int
    old_nbytes: int
    new_nbytes: int
    old_dtypes: frozenset[mx.Dtype]
    new_dtypes: frozenset[mx.Dtype]


class Left(NamedTuple):
    """What was left as it is, or did not come along, for one reason.

    Attributes:
        what (str): What it is: ``"layers"``, ``"arrays"`` or ``"files"``.
        why (str): The reason.
        count (int): How many there are.
        nbytes (int): Their size in bytes.
        pattern (tuple[Pattern, ...]): Their places, in patterns; those of layers are what
            ``select`` takes.
    """

    what: str
    why: str
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]  # hides `tuple.count`
    nbytes: int
    pattern: tuple[Pattern, ...]

    def __str__(self) -> str:
        """Write the line of the report."""
        what = self.what if self.count > 1 else self.what.removesuffix("s")
        places = listed(map(as_text, self.pattern), 4)
        return f"left: {self.count} {what}, {size(self.nbytes)}: {self.why} ({places})"


def left(what: str, why: str, sizes: Mapping[str, int]) -> Left:
    """Describe what was left as it is, given the size in bytes of each, by its path."""
    paths = [segments(path, numbers_are_indices=True) for path in sizes]
    pattern = tuple(selector_of(product) for product, _ in fold(paths))
    return Left(what, why, len(sizes), sum(sizes.values()), pattern)


class _Line(NamedTuple):
    """A line before it is printed, with all measures of its old and new modules."""

    pattern: Pattern
    old_name: str
    new_name: str
    places: int
    old: Measure
    new: Measure
    note: str = ""


class Replacement(Mapping[str, nn.Module]):
    """What a swap has changed: a mapping from path to *new* module, in definition order.

    It contains only the places that changed, and keeps no replaced module alive. Its
    ``str()`` shows these places in a few lines. Each line starts with a pattern that
    selects exactly the places of the line::

        model.layers[0:32].self_attn.{q,v}_proj   Linear -> LoRALinear   x64   ...

    Places that were decided by different rules never share a line. If there are several
    lines, the last one is the total. A notebook shows the lines as a table.

    ``changes`` has the same content as data: a list with a named tuple for each line
    except the total. The fields of a tuple are

    * ``pattern``: The pattern with which :func:`select` finds the places: a ``str``, or
      a compiled regular expression if no ``str`` matches exactly these places.
    * ``old`` and ``new``: The names of the classes as printed: with the bits of a
      quantized layer, and with the Python module if two classes have the same name.
    * ``count``: The number of places.
    * ``old_params`` and ``new_params``: The number of parameters, before quantization.
    * ``old_nbytes`` and ``new_nbytes``: The size of the arrays in bytes.
    * ``old_dtypes`` and ``new_dtypes``: A ``frozenset`` of :class:`mlx.core.Dtype`.

    Only ``mlx_modswap.lm`` fills two more attributes. ``left`` is what was *not* done:
    a list with a named tuple for each reason, which are the last lines of the report. The
    fields are ``what`` (``"layers"``, ``"arrays"`` or ``"files"``), ``why``, ``count``,
    ``nbytes`` and ``pattern``, a tuple of patterns of these places. ``notes`` maps a path
    to what its line says at the end: that the model's own ``quant_predicate`` decided.

    ``old_nbytes`` and ``new_nbytes`` of the replacement itself are the sums over all
    lines. A module in several places is counted only at the first of them. All figures
    are determined when one of them is first read, and do not change afterwards.

    Example:
        >>> import mlx.nn as nn
        >>> from mlx_modswap import replace_layers
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> report = replace_layers(model, "layers[::2]", lambda path, layer: layer.to_quantized())
        >>> for change in report.changes:
        ...     print(change.pattern, change.new, change.old_nbytes, change.new_nbytes)
        layers.{0,2} QuantizedLinear(bits=4) 33280 5632
    """

    def __init__(
        self,
        paths: Sequence[str],
        old_modules: Sequence[nn.Module],
        new_modules: Sequence[nn.Module],
        rules: Sequence[int],
        numbers_are_indices: bool,
    ):
        self._paths = paths
        self._new_modules = new_modules
        self._old_modules = record(old_modules)
        self._rules = rules  # the number of the rule that decided each place
        self.left: list[Left] = []
        self.notes: dict[str, str] = {}  # what is to be said about single places
        self._numbers_are_indices = (
            numbers_are_indices  # whether every number in a path is an index of a list
        )

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(zip(self._paths, self._new_modules))

    def __getitem__(self, path: str) -> nn.Module:
        return self._modules[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    @property
    def changes(self) -> list[Change]:
        """What changed, line by line."""
        return [
            Change(
                *(line.pattern, line.old_name, line.new_name, line.places),
                *(line.old.params, line.new.params),
                *(line.old.nbytes, line.new.nbytes),
                *(line.old.dtypes, line.new.dtypes),
            )
            for line in self._lines
        ]

    @property
    def old_nbytes(self) -> int:
        """The size of the arrays of all replaced modules in bytes."""
        return sum(line.old.nbytes for line in self._lines)

    @property
    def new_nbytes(self) -> int:
        """The size of the arrays of all new modules in bytes."""
        return sum(line.new.nbytes for line in self._lines)

    def __repr__(self) -> str:
        return f"<Replacement of {len(self)} modules>"

    def __str__(self) -> str:
        lines = aligned(self._rows()) if self else ["nothing changed"]
        return "\n".join([*lines, *map(str, self.left)])

    def _repr_html_(self) -> str:
        left = "".join(f"<p>{escape(str(one))}</p>" for one in self.left)
        if not self:
            return f"<p>nothing changed</p>{left}"
        columns = [column for column in zip(*self._rows()) if any(column)]
        cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in zip(*columns))
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>{left}"

    @cached_property
    def _lines(self) -> list[_Line]:
        old_modules, new_modules = self._old_modules(), measure(self._new_modules)
        paths = [
            segments(path, numbers_are_indices=self._numbers_are_indices) for path in self._paths
        ]
        names = class_names(one.cls for one in (*old_modules, *new_modules))
        groups: dict[tuple[Any, ...], list[int]] = {}
        for at, (rule, old, new) in enumerate(zip(self._rules, old_modules, new_modules)):
            note = self.notes.get(self._paths[at], "")
            key = rule, note, _name(old, names), _name(new, names), old.dtypes, new.dtypes
            groups.setdefault(key, []).append(at)
        lines: list[_Line] = []
        for (_, note, old_name, new_name, *_), group in groups.items():
            for product, positions in fold([paths[at] for at in group]):
                places = [group[position] for position in positions]
                old, new = (total(of[at] for at in places) for of in (old_modules, new_modules))
                pattern = selector_of(product)
                lines.append(_Line(pattern, old_name, new_name, len(places), old, new, note))
        return lines

    def _rows(self) -> list[list[str]]:
        """Return the cells of each printed line."""
        rows = [_cells(line, _tells_trainable(line)) for line in self._lines[:_MOST_LINES]]
        if (more := len(self._lines) - _MOST_LINES) > 0:
            rows.append([f"... {more} more", *("" for _ in rows[0][1:])])
        if len(self._lines) > 1:
            rows.append(_cells(_total_of(self._lines), any(map(_tells_trainable, self._lines))))
        return rows


def _name(of: Measure, names: dict[type, str]) -> str:
    return names[of.cls] + (f"(bits={of.bits})" if of.bits else "")


def _total_of(lines: list[_Line]) -> _Line:
    """Return the line with the totals; it does not repeat classes and dtypes."""
    places = sum(line.places for line in lines)
    old, new = (
        total(measures)._replace(dtypes=frozenset())
        for measures in ([line.old for line in lines], [line.new for line in lines])
    )
    return _Line("total", "", "", places, old, new)


def _tells_trainable(line: _Line) -> bool:
    """Return whether a line shows how many parameters are trainable.

    It does if their number changes, except in the usual case: all old parameters are trainable,
    and all new ones are trainable or belong to a quantized layer.
    """
    old, new = line.old, line.new
    if old.trainable == new.trainable:
        return False
    return old.trainable < old.params or (new.trainable < new.params and not new.bits)


def _cells(line: _Line, tells_trainable: bool) -> list[str]:
    old, new = line.old, line.new
    return [
        as_text(line.pattern),
        _arrow(line.old_name, line.new_name),
        f"x{line.places}",
        f"{_change(old.params, new.params, number)} params" if old.params or new.params else "",
        f"{_change(old.trainable, new.trainable, number)} trainable" if tells_trainable else "",
        _change(old.nbytes, new.nbytes, size) if old.nbytes or new.nbytes else "",
        _arrow(dtypes(old.dtypes), dtypes(new.dtypes)) if old.dtypes or new.dtypes else "",
        line.note,
    ]


def _change(before: int, after: int, text: Callable[[int], str]) -> str:
    """Format ``4000, 0`` as ``'4.0K -> 0'``, and ``8000000, 8000012`` as ``'8.0M + 12'``."""
    if before != after and text(before) == text(after):
        return f"{text(before)} {'+' if after > before else '-'} {text(abs(after - before))}"
    return _arrow(text(before), text(after))


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"
