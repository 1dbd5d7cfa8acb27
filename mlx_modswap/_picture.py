"""Lines of a picture -> text, HTML or data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from heapq import heappop, heappush
from html import escape
from typing import Any

import mlx.core as mx

from ._fold import Product, Segment, is_plain, pattern_of
from ._report import aligned, dtypes, number, size

_LINES, _LINES_INSIDE = 40, 24  # of a text, and below one of its lines
_ROWS, _ROWS_INSIDE = 2000, 200  # of an HTML page, most of them closed
_LONGEST_PATH = 32  # in a note
_DEEPEST = 100  # a browser nests no more than some hundreds


class Row:
    """A line: places that look the same, and the lines that hang below it.

    Attributes:
        above (Row, optional): The line above.
        product (Product): The places, seen from those of the line above.
        text (str): What stands there.
        path (str): The pattern that selects the places.
        count (int): How many places there are.
        marked (bool): Whether they are selected.
        selected (int): How many places are, these and those in the lines below.
        private (bool): Whether the line above does not count their parameters.
        note (str): What else there is to say.
        look (int): Equal for those whose places look the same, 0 if they hold no module.
        rows (list[Row]): The lines below.
        modules (int): How many modules there are in the lines below.
        params (int): How many parameters the places hold together.
        trainable (int): How many of these are not frozen.
        nbytes (int): Their size in bytes.
        dtypes (set[mx.Dtype]): Their dtypes.
    """

    def __init__(
        self,
        above: Row | None,
        product: Product,
        text: str,
        count: int,
        marked: bool,
        private: bool,
    ):
        self.above = above
        self.product = product
        self.text = text
        self.is_plain = is_plain(product) and (above is None or above.is_plain)
        around = f"{above.path}." if above and above.path else ""
        self.path = f"{around}{pattern_of(product)}" if self.is_plain else self._path()
        self.count = count
        self.marked = marked
        self.selected = count * marked
        self.private = private
        self.note = ""
        self.rows: list[Row] = []
        self.look = self.modules = self.params = self.trainable = self.nbytes = 0
        self.dtypes: set[mx.Dtype] = set()
        if above is not None:
            above.rows.append(self)

    @property
    def is_module(self) -> bool:
        """Whether a module to MLX stands there."""
        return self.look != 0

    def _path(self) -> str:
        """What :attr:`path` is where some name is no pattern by itself."""
        choices: list[tuple[Segment, ...]] = []
        row: Row | None = self
        while row is not None:
            choices.extend(reversed(row.product))
            row = row.above
        return pattern_of(tuple(reversed(choices)))

    def add(self, row: Row) -> None:
        """Count in a line below, with all that is below that."""
        self.selected += row.selected
        if not row.private:
            self.params += row.params
            self.trainable += row.trainable
            self.nbytes += row.nbytes
            self.dtypes |= row.dtypes


Line = Row | str  # a text is no part of the model
Opened = dict[Line, list[Line]]  # what is shown below each line that is open


class Tree:
    """A picture of a model: print it, or let a notebook show it."""

    def __init__(self, rows: list[Row], chosen_by: str, selected: int | None, frozen: bool):
        self._rows = rows
        self._chosen_by = chosen_by  # what was to be marked, '' for nothing
        self._selected = selected
        self._frozen = frozen  # whether to say what is trainable

    def __str__(self) -> str:
        top = self._rows[0]
        opened = _opened(top, _LINES - bool(self._chosen_by), _LINES_INSIDE)
        cells: list[list[str]] = []
        marks: list[bool] = []
        for depth, line in _walk(top, opened):
            name, *others = self._cells(line, opened)
            cells.append(["  " * depth + name, *others])
            marks.append(isinstance(line, Row) and line.marked)
        lines = aligned(cells)
        if self._chosen_by:
            lines = [("* " if marked else "  ") + line for marked, line in zip(marks, lines)]
            if _wants_colour():
                lines = [f"\x1b[1;32m{line}\x1b[0m" if m else line for m, line in zip(marks, lines)]
            lines.append(self._summary())
        return "\n".join(lines)

    __repr__ = __str__

    def _cells(self, row: Line, opened: Opened) -> list[str]:
        if isinstance(row, str):
            return [row, *[""] * 7]
        is_top = row.above is None
        return [
            row.text if is_top else pattern_of(row.product),
            "" if is_top else row.text,
            f"x{row.count}" if row.count > 1 else "",
            number(row.params) + " params" * is_top if row.params else "",
            number(row.trainable) + " trainable" * is_top if row.params and self._frozen else "",
            size(row.nbytes) if row.nbytes else "",
            dtypes(row.dtypes) if row.dtypes else "",
            ", ".join(filter(None, [row.note, _what_is_closed(row, opened)])),
        ]

    def _summary(self) -> str:
        return f"{self._chosen_by} selects {self._selected} of {_counted(self._rows[0].modules)}"

    def _repr_html_(self) -> str:
        top = self._rows[0]
        opened = _opened(top, _ROWS, _ROWS_INSIDE)
        open_at_first = _opened(top, _LINES, _LINES_INSIDE)
        parts = [f'<div class="mlx-modswap"><style>{_STYLE}</style>']
        depth_before = 0
        for depth, row in _walk(top, opened):
            parts.append("</details>" * (depth_before - depth))
            depth_before = depth
            name, text, *numbers, note = map(escape, self._cells(row, opened))
            if not self._frozen:
                del numbers[2]
            numbers = "".join(f"<span>{cell}</span>" for cell in numbers)
            line = f"<span><b>{name}</b> <i>{text}</i> <small>{note}</small></span>{numbers}"
            kind = ' class="marked"' if isinstance(row, Row) and row.marked else ""
            if row in opened:
                is_open = " open" if row in open_at_first else ""
                parts.append(f"<details{is_open}><summary{kind}>{line}</summary>")
            else:
                parts.append(f"<p{kind}>{line}</p>")
        parts.append("</details>" * depth_before)
        if self._chosen_by:
            parts.append(f"<footer>{escape(self._summary())}</footer>")
        return "".join(parts) + "</div>"

    def data(self) -> dict[str, Any]:
        """The whole picture as data, as ``python -m mlx_modswap --help`` describes it."""
        return {
            "modules": self._rows[0].modules,
            "selected": self._selected,
            "places": [
                {
                    "path": row.path,
                    "class": row.text.partition("(")[0] if row.is_module else None,
                    "text": row.text,
                    "count": row.count,
                    "params": row.params,
                    "trainable": row.trainable,
                    "bytes": row.nbytes,
                    "dtypes": dtypes(row.dtypes).split(", ") if row.dtypes else [],
                    "selected": row.marked,
                    "note": row.note,
                }
                for row in self._rows
            ],
        }


_STYLE = """
.mlx-modswap { font: 12px/1.6 ui-monospace, Menlo, Consolas, monospace; max-width: 90em; }
.mlx-modswap details > :not(summary) { margin-left: 1.4em; }
.mlx-modswap p, .mlx-modswap summary {
  display: flex; margin: 0; padding: 0 .4em; border-radius: 3px; white-space: nowrap;
}
.mlx-modswap span { overflow: hidden; text-overflow: ellipsis; text-align: right; flex: 0 0 8em;
  margin-left: 1em; }
.mlx-modswap span:first-child { text-align: left; flex: 1; margin: 0; }
.mlx-modswap span:nth-child(2) { flex-basis: 4em; }
.mlx-modswap span:nth-child(4) { flex-basis: 9.5em; }
.mlx-modswap span:last-child { flex-basis: 13em; }
.mlx-modswap i, .mlx-modswap small, .mlx-modswap span + span { opacity: .65; font-style: normal; }
.mlx-modswap summary { cursor: pointer; }
.mlx-modswap b::before { content: ""; display: inline-block; width: 1.2em; }
.mlx-modswap summary b::before { content: "\\25B8"; }
.mlx-modswap details[open] > summary b::before { content: "\\25BE"; }
.mlx-modswap p:hover, .mlx-modswap summary:hover { background: rgba(128, 128, 128, .15); }
.mlx-modswap .marked { background: rgba(255, 190, 0, .3); }
"""


def _walk(top: Row, opened: Opened) -> Iterator[tuple[int, Line]]:
    """Depth and line, from the top down."""
    waiting: list[tuple[int, Line]] = [(0, top)]
    while waiting:
        depth, line = waiting.pop()
        yield depth, line
        waiting.extend((depth + 1, one) for one in reversed(opened.get(line, [])))


def _opened(top: Row, lines: int, lines_inside: int) -> Opened:
    """The lines that are open, and what is shown below each: the most telling that fit."""
    opened: Opened = {}
    looks: set[int] = set()
    waiting = [(False, False, 0, 0, top)]
    count = pushed = 1
    while waiting:
        comes_again, unmarked, depth, place, row = heappop(waiting)
        if row.look in looks and not comes_again:
            heappush(waiting, (True, unmarked, depth, place, row))
            continue
        inner: list[Line] = [*row.rows]
        if len(inner) > lines_inside:
            telling = set(sorted(row.rows, key=lambda one: not one.selected)[: lines_inside - 1])
            inner = [one for one in row.rows if one in telling]
            inner.append(f"... {len(row.rows) - len(inner)} more")
        if not inner or depth == _DEEPEST or count + len(inner) > lines:
            continue
        opened[row] = inner
        looks.add(row.look)
        count += len(inner)
        for one in inner:
            if isinstance(one, Row):
                heappush(waiting, (False, not one.selected, depth + 1, pushed, one))
                pushed += 1
    return opened


def _what_is_closed(row: Row, opened: Opened) -> str:
    """What is below a line, if that is not shown."""
    if not row.rows or row in opened:
        return ""
    same = next((one for one in opened if isinstance(one, Row) and one.look == row.look), None)
    if same and len(same.path) > _LONGEST_PATH:
        return f"as ...{same.path[3 - _LONGEST_PATH :]}"
    if same:
        return f"as {same.path}"
    selected = row.selected - row.marked * row.count
    return f"{_counted(row.modules)} inside" + (f", {selected} selected" if selected else "")


def _counted(modules: int) -> str:
    return f"{modules} module" + "s" * (modules != 1)


def _wants_colour() -> bool:
    """Whether what is printed goes to a terminal that shows colours."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return sys.stdout is not None and sys.stdout.isatty()
