"""Draw the lines of a picture as text or HTML."""

from __future__ import annotations

import os
import sys
from heapq import heappop, heappush
from html import escape

from .._patterns.fold import Product, is_plain, pattern_of
from .._words import aligned, counted, dtypes, number, size
from .forms import Form
from .measure import NOTHING, Measure

_LINES, _CHILDREN = 40, 24  # at most: in the text, and directly below one of its lines
_HTML_LINES, _HTML_CHILDREN = 2000, 200  # the same in HTML, where most lines are collapsed
_LONGEST_PATTERN = 32  # in a note
_DEEPEST = 100  # browsers do not nest elements deeper than some hundreds


class Row:
    """A line of the picture: places that look the same.

    Attributes:
        parent (Row, optional): The line whose places contain the places of this line.
        product (Product): The paths of the places, from the places of the parent.
        count (int): How many places there are.
        text (str): What is at the places.
        form (Form, optional): The form of the modules, if they are modules.
        tied (bool): Whether they have parameters and are in other places, too.
        marked (bool): Whether they are selected.
        private (bool): Whether their parameters do not count in the parent.
        note (str): A remark at the end of the line.
        measure (Measure): What the places hold together.
        children (list[Row]): The lines directly below it.
        whole (Product): The paths of the places, from the model.
        is_plain (bool): Whether a pattern without a regular expression selects them.
        pattern (str): The pattern that selects the places.
        modules (int): How many descendants the places have.
        selected (int): How many places are selected, of this line and all lines below it.
        uncounted (bool): Whether ``model.parameters()`` leaves out the parameters of the
            places, because this line or a line that contains it is private.
    """

    def __init__(
        self,
        parent: Row | None,
        product: Product,
        count: int,
        text: str,
        form: Form | None = None,
        tied: bool = False,
        marked: bool = False,
        private: bool = False,
        note: str = "",
        measure: Measure = NOTHING,
    ):
        self.parent, self.product, self.count = parent, product, count
        self.text, self.form, self.tied = text, form, tied
        self.marked, self.private, self.note = marked, private, note
        self.measure = measure
        self.children: list[Row] = []
        self.modules = form.modules * count if form else 0
        self.selected = count * marked
        self.uncounted: bool = private or (parent is not None and parent.uncounted)
        self.whole: Product = parent.whole + product if parent else product
        self.is_plain: bool = is_plain(product) and (parent is None or parent.is_plain)
        if parent and self.is_plain:  # otherwise a deep model would take quadratic time
            self.pattern = f"{parent.pattern}.{pattern_of(product)}".removeprefix(".")
        else:
            self.pattern = pattern_of(self.whole)
        if parent:
            parent.children.append(self)


Expanded = dict[Row, list[Row]]  # what to show below each line that is expanded


class Tree:
    """A picture of a model: print it, or let a notebook show it."""

    def __init__(self, rows: list[Row], chosen_by: str, selected: int | None, is_frozen: bool):
        self._rows = rows
        self._shows_trainable = is_frozen
        summary = f"{chosen_by} selects {selected} of {counted(rows[0].modules)}"
        self._summary = [] if selected is None else [summary]

    def __str__(self) -> str:
        unmarked, marked = "  {}" if self._summary else "{}", "* {}"
        if _wants_colour():
            marked = f"\x1b[1;32m{marked}\x1b[0m"
        lines = self._lines(self._fitting_a_screen())
        texts = [(marked if row.marked else unmarked).format(text) for _, row, text in lines]
        return "\n".join([*texts, *self._summary])

    __repr__ = __str__

    def _fitting_a_screen(self) -> Expanded:
        return choose_expanded(self._rows[0], _LINES - len(self._summary), _CHILDREN)

    def _lines(self, expanded: Expanded) -> list[tuple[int, Row, str]]:
        """Return depth, row and text of each line, in aligned columns."""
        rows: list[tuple[int, Row]] = []
        waiting = [(0, self._rows[0])]
        while waiting:
            depth, row = waiting.pop()
            rows.append((depth, row))
            waiting.extend((depth + 1, child) for child in reversed(expanded.get(row, [])))
        texts = aligned([self._cells(depth, row, expanded) for depth, row in rows])
        return [(depth, row, text) for (depth, row), text in zip(rows, texts)]

    def _cells(self, depth: int, row: Row, expanded: Expanded) -> list[str]:
        _, _, params, trainable, nbytes, kinds = row.measure
        is_top = row.parent is None
        return [
            "  " * depth + (row.text if is_top else pattern_of(row.product)),
            "" if is_top else row.text,
            f"x{row.count}" if row.count > 1 else "",
            number(params) + " params" * is_top if params else "",
            number(trainable) + " trainable" * is_top if params and self._shows_trainable else "",
            size(nbytes) if nbytes else "",
            dtypes(kinds) if kinds else "",
            ", ".join(filter(None, [row.note, _what_is_collapsed(row, expanded)])),
        ]

    def _repr_html_(self) -> str:
        at_first = self._fitting_a_screen()
        expanded = choose_expanded(self._rows[0], _HTML_LINES, _HTML_CHILDREN)
        parts = [f'<div class="mlx-modswap"><style>{_STYLE}</style>']
        depth_before = 0
        for depth, row, text in self._lines(expanded):
            parts.append("</details>" * (depth_before - depth))
            depth_before = depth
            name, space, others = escape(text.strip()).partition("   ")
            line = f"<b>{name}</b><i>{space}{others}</i>"
            kind = ' class="marked"' if row.marked else ""
            if row in expanded:
                is_open = " open" if row in at_first else ""
                parts.append(f"<details{is_open}><summary{kind}>{line}</summary>")
            else:
                parts.append(f"<p{kind}>{line}</p>")
        parts.append("</details>" * depth_before)
        parts += [f"<footer>{escape(line)}</footer>" for line in self._summary]
        return "".join(parts) + "</div>"


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


def choose_expanded(top: Row, most_lines: int, most_children: int) -> Expanded:
    """Choose which lines to expand: top-down, most informative first, until the picture is full.

    A line is in the heap only if its parent is expanded. So every expanded line will be
    visible, and `lines` is the number of lines that will be printed. The order of the
    heap has these criteria, the most important one first:

    1. whether the form of a line is not expanded elsewhere: of two lines that look the
       same, the second only repeats the first, and says ``as ...`` if it stays collapsed;
    2. whether the line contains a selected place, since the user asked about these;
    3. how near the line is to the top, and its number.

    Whether a form is expanded elsewhere is only known when its line is taken from the
    heap. If it is, the line goes back with the lowest rank, and is expanded if there is
    room in the end. A line that does not fit stays collapsed, and the search continues,
    since a smaller one may fit.
    """
    expanded: Expanded = {}
    forms: set[Form | None] = set()
    waiting = [(False, False, 0, 0, top)]
    lines = 1
    while waiting:
        repeats, unselected, depth, order, row = heappop(waiting)
        if row.form in forms and not repeats:
            heappush(waiting, (True, unselected, depth, order, row))
            continue
        children = _fewer(row.children, most_children)
        if not children or depth == _DEEPEST or lines + len(children) > most_lines:
            continue
        expanded[row] = children
        forms.add(row.form)
        for child in children:
            heappush(waiting, (False, not child.selected, depth + 1, lines, child))
            lines += 1
    return expanded


def _fewer(rows: list[Row], most: int) -> list[Row]:
    """Return at most ``most`` rows in order, preferring selected ones; the last counts the rest."""
    if len(rows) <= most:
        return rows
    chosen = set(sorted(rows, key=lambda row: not row.selected)[: most - 1])
    rest = Row(None, (), 1, f"... {len(rows) - len(chosen)} more")
    return [*(row for row in rows if row in chosen), rest]


def _what_is_collapsed(row: Row, expanded: Expanded) -> str:
    """Write what a line says about the lines below it if they are not shown."""
    if not row.children or row in expanded:
        return ""
    same = next((other for other in expanded if other.form is row.form), None)
    if same:
        is_short = len(same.pattern) <= _LONGEST_PATTERN
        return "as " + (same.pattern if is_short else f"...{same.pattern[3 - _LONGEST_PATTERN :]}")
    selected = row.selected - row.marked * row.count
    return f"{counted(row.modules)} inside" + (f", {selected} selected" if selected else "")


def _wants_colour() -> bool:
    """Return whether the output goes to a terminal that shows colours."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return sys.stdout is not None and sys.stdout.isatty()
