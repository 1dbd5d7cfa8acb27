"""Lines of a picture -> text, HTML or data."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from heapq import heappop, heappush
from html import escape
from typing import Any

from .._fold import Product, is_plain, pattern_of
from .._measure import NOTHING, Measure
from .._report import aligned, dtypes, number, size
from .forms import Form

_LINES, _LINES_INSIDE = 40, 24  # of a text, and below one of its lines
_ROWS, _ROWS_INSIDE = 2000, 200  # of an HTML page, most of them closed
_LONGEST_PATH = 32  # in a note
_DEEPEST = 100  # a browser nests no more than some hundreds


@dataclass(eq=False)
class Row:
    """A line: places that look the same, and the lines that hang below it.

    Attributes:
        above (Row, optional): The line above.
        product (Product): The places, seen from those of the line above.
        count (int): How many places there are.
        text (str): What stands there.
        form (Form, optional): What that looks like, if it is a module.
        tied (bool): Whether it has parameters and stands in other places, too.
        marked (bool): Whether they are selected.
        private (bool): Whether the line above does not count their parameters.
        note (str): What else there is to say.
        held (Measure): What the places hold together.
        rows (list[Row]): The lines below.
        whole (Product): The places, seen from the model.
        is_plain (bool): Whether these are a pattern without a regular expression.
        path (str): The pattern that selects the places.
        modules (int): How many modules there are in the lines below.
        selected (int): How many places are, these and those in the lines below.
        hidden (bool): Whether the parameters are none of the model: the line or one above
            is private.
    """

    above: Row | None
    product: Product
    count: int
    text: str
    form: Form | None = None
    tied: bool = False
    marked: bool = False
    private: bool = False
    note: str = ""
    held: Measure = NOTHING
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self):
        above = self.above
        self.modules = self.form.modules * self.count if self.form else 0
        self.selected = self.count * self.marked
        self.hidden: bool = self.private or (above is not None and above.hidden)
        self.whole: Product = above.whole + self.product if above else self.product
        self.is_plain: bool = is_plain(self.product) and (above is None or above.is_plain)
        if above and self.is_plain:
            self.path = f"{above.path}.{pattern_of(self.product)}".removeprefix(".")
        else:
            self.path = pattern_of(self.whole)
        if above:
            above.rows.append(self)


Opened = dict[Row, list[Row]]  # what is shown below each line that is open


class Tree:
    """A picture of a model: print it, or let a notebook show it."""

    def __init__(self, rows: list[Row], chosen_by: str, selected: int | None, frozen: bool):
        self._rows = rows
        self._selected = selected  # None if nothing was to be marked
        self._frozen = frozen  # whether to say what is trainable
        summary = f"{chosen_by} selects {selected} of {_counted(rows[0].modules)}"
        self._summary = [] if selected is None else [summary]

    def __str__(self) -> str:
        unmarked, marked = "  {}" if self._summary else "{}", "* {}"
        if _wants_colour():
            marked = f"\x1b[1;32m{marked}\x1b[0m"
        opened = _opened(self._rows[0], _LINES - len(self._summary), _LINES_INSIDE)
        drawn = self._drawn(opened)
        lines = [(marked if row.marked else unmarked).format(text) for _, row, text in drawn]
        return "\n".join([*lines, *self._summary])

    __repr__ = __str__

    def _drawn(self, opened: Opened) -> list[tuple[int, Row, str]]:
        """Depth, row and text of each line, in columns."""
        lines: list[tuple[int, Row]] = []
        waiting = [(0, self._rows[0])]
        while waiting:
            depth, row = waiting.pop()
            lines.append((depth, row))
            waiting.extend((depth + 1, one) for one in reversed(opened.get(row, [])))
        texts = aligned([self._cells(depth, row, opened) for depth, row in lines])
        return [(depth, row, text) for (depth, row), text in zip(lines, texts)]

    def _cells(self, depth: int, row: Row, opened: Opened) -> list[str]:
        held, is_top = row.held, row.above is None
        return [
            "  " * depth + (row.text if is_top else pattern_of(row.product)),
            "" if is_top else row.text,
            f"x{row.count}" if row.count > 1 else "",
            number(held.params) + " params" * is_top if held.params else "",
            number(held.trainable) + " trainable" * is_top if held.params and self._frozen else "",
            size(held.nbytes) if held.nbytes else "",
            dtypes(held.dtypes) if held.dtypes else "",
            ", ".join(filter(None, [row.note, _what_is_closed(row, opened)])),
        ]

    def _repr_html_(self) -> str:
        opened = _opened(self._rows[0], _ROWS, _ROWS_INSIDE)
        open_at_first = _opened(self._rows[0], _LINES - len(self._summary), _LINES_INSIDE)
        parts = [f'<div class="mlx-modswap"><style>{_STYLE}</style>']
        depth_before = 0
        for depth, row, text in self._drawn(opened):
            parts.append("</details>" * (depth_before - depth))
            depth_before = depth
            name, space, others = escape(text.strip()).partition("   ")
            line = f"<b>{name}</b><i>{space}{others}</i>"
            kind = ' class="marked"' if row.marked else ""
            if row in opened:
                is_open = " open" if row in open_at_first else ""
                parts.append(f"<details{is_open}><summary{kind}>{line}</summary>")
            else:
                parts.append(f"<p{kind}>{line}</p>")
        parts.append("</details>" * depth_before)
        parts += [f"<footer>{escape(line)}</footer>" for line in self._summary]
        return "".join(parts) + "</div>"

    def data(self) -> dict[str, Any]:
        """The whole picture as data, as ``python -m mlx_modswap --help`` describes it."""
        places = [
            {
                "path": row.path,
                "class": row.text.partition("(")[0] if row.form else None,
                "text": row.text,
                "count": row.count,
                "params": row.held.params,
                "trainable": row.held.trainable,
                "bytes": row.held.nbytes,
                "dtypes": dtypes(row.held.dtypes).split(", ") if row.held.dtypes else [],
                "selected": row.marked,
                "note": row.note,
            }
            for row in self._rows
        ]
        return {"modules": self._rows[0].modules, "selected": self._selected, "places": places}


_STYLE = """
.mlx-modswap { font: 12px/1.6 ui-monospace, Menlo, Consolas, monospace; white-space: pre;
  overflow-x: auto; }
.mlx-modswap details > :not(summary) { margin-left: 2ch; }
.mlx-modswap p, .mlx-modswap summary { display: block; margin: 0; }
.mlx-modswap summary { cursor: pointer; }
.mlx-modswap i { opacity: .65; font-style: normal; }
.mlx-modswap b::before { content: ""; display: inline-block; width: 2ch; }
.mlx-modswap summary b::before { content: "\\25B8"; }
.mlx-modswap details[open] > summary b::before { content: "\\25BE"; }
.mlx-modswap p:hover, .mlx-modswap summary:hover { background: rgba(128, 128, 128, .15); }
.mlx-modswap .marked { background: rgba(255, 190, 0, .3); }
"""


def _opened(top: Row, lines: int, lines_inside: int) -> Opened:
    """The lines that are open, and what is shown below each: the most telling that fit."""
    opened: Opened = {}
    forms: set[Form | None] = set()
    waiting = [(False, False, 0, 0, top)]
    count = 1
    while waiting:
        comes_again, unmarked, depth, place, row = heappop(waiting)
        if row.form in forms and not comes_again:
            heappush(waiting, (True, unmarked, depth, place, row))
            continue
        inner = row.rows
        if len(inner) > lines_inside:
            telling = set(sorted(inner, key=lambda one: not one.selected)[: lines_inside - 1])
            inner = [one for one in inner if one in telling]
            inner.append(Row(None, (), 1, f"... {len(row.rows) - len(inner)} more"))
        if not inner or depth == _DEEPEST or count + len(inner) > lines:
            continue
        opened[row] = inner
        forms.add(row.form)
        for one in inner:
            heappush(waiting, (False, not one.selected, depth + 1, count, one))
            count += 1
    return opened


def _what_is_closed(row: Row, opened: Opened) -> str:
    """What is below a line, if that is not shown."""
    if not row.rows or row in opened:
        return ""
    same = next((one for one in opened if one.form is row.form), None)
    if same:
        is_short = len(same.path) <= _LONGEST_PATH
        return "as " + (same.path if is_short else f"...{same.path[3 - _LONGEST_PATH :]}")
    selected = row.selected - row.marked * row.count
    return f"{_counted(row.modules)} inside" + (f", {selected} selected" if selected else "")


def _counted(modules: int) -> str:
    return f"{modules} module" + "s" * (modules != 1)


def _wants_colour() -> bool:
    """Whether what is printed goes to a terminal that shows colours."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return sys.stdout is not None and sys.stdout.isatty()
