"""A model -> a picture of it that fits on a screen."""

from __future__ import annotations

from functools import reduce
from typing import Any

import mlx.nn as nn

from .._containers import Container, Location, is_private, unwrapped, value_at
from .._errors import listed
from .._fold import fold
from .._match import Patterns, Rule, Where, parse_argument
from .._measure import total
from .._select import check_model, choose
from .forms import Form, form_of
from .picture import Row, Tree


def tree(
    model: nn.Module,
    pattern: Patterns = "**",
    *,
    where: Where | None = None,
    exclude: Patterns = (),
) -> Tree:
    """Draw a model, with a mark at what a pattern selects.

    Places that look the same share a line, which begins with their pattern:
    ``layers[0:32]`` are 32 equal layers. The numbers of a line are those of all
    its places together, and a module in several places counts in the first.
    Lines that do not fit on a screen are closed: draw a part of the model to see
    more of it. What stands where a module could but is none to MLX (a function,
    ``None``, modules in a tuple) is shown as what it is.

    Args:
        model (mlx.nn.Module): The model to draw. The picture does not hold on to it.
        pattern (str, re.Pattern or an iterable of them): What to mark, as in
            :func:`select`. Default: ``"**"``, and nothing is marked.
        where (type, tuple of types or Callable, optional): See :func:`select`.
            Default: ``None``.
        exclude (str, re.Pattern or an iterable of them): See :func:`select`.
            Default: ``()``.

    Returns:
        Tree: A picture to print. In a notebook it opens and closes.

    Raises:
        PatternError: If the text of a pattern is wrong.
        NoMatchError: If a pattern, ``exclude`` or ``where`` does nothing.
        SelectionError: If the model holds a cycle.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> import mlx.nn as nn
        >>> from mlx_modswap import tree
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        >>> print(tree(model, "layers[-1]"))
          Sequential                          40 params   160 B   float32
            layers.0   Linear(4 -> 4, bias)   20          80 B    float32
            layers.1   ReLU
        *   layers.2   Linear(4 -> 4, bias)   20          80 B    float32
        'layers[-1]' selects 1 of 3 modules
    """
    check_model(model)
    patterns = parse_argument(model, "pattern", pattern)
    excludes = parse_argument(model, "exclude", exclude)
    narrowed = ["where"] * (where is not None) + ["exclude"] * bool(excludes)
    marked: set[Location] = set()
    chosen_by, selected = "", None
    if narrowed or not isinstance(pattern, str) or pattern != "**":
        places = choose(model, [Rule(patterns)], where, excludes, strict=True).places
        selected = len(places.paths)
        marked.update(places.locations())
        chosen_by = listed(one.text for one in patterns)
        chosen_by += " with " * bool(narrowed) + " and ".join(narrowed)
    form = form_of(model, marked)
    return Tree(_rows(model, form), chosen_by, selected, form.frozen)


def _rows(model: nn.Module, form: Form) -> list[Row]:
    """The picture, line by line. What comes again is not counted again."""
    firsts: dict[int, Row] = {}  # where each module with parameters is first, if some are shared
    rows: list[Row] = []
    waiting: list[_Line] = [(Row(None, (), 1, form.text, form), [model])]
    while waiting:
        row, modules = waiting.pop()
        rows.append(row)
        if row.form is None:
            continue
        if row.form.solid and row.private:
            row.note = "not in parameters()"
        if row.tied:
            different = {id(unwrapped(module)): module for module in modules}
            modules = [module for key, module in different.items() if key not in firsts]
            row.note = "tied"
            if not modules:
                row.note += f" to {firsts[next(iter(different))].path}"
            elif len(modules) < row.count:
                fresh = len(modules)
                row.note += ", one module" if fresh == 1 else f", {fresh} modules"
            if not row.hidden:
                firsts.update((id(unwrapped(module)), row) for module in modules)
        if modules:
            row.held = total([row.form.own] * len(modules))
            waiting.extend(reversed(_below(row, row.form, modules)))
    for row in reversed(rows):
        if row.above:
            row.above.selected += row.selected
            if not row.private:
                row.above.held = total([row.above.held, row.held])
    return rows


_Line = tuple[Row, list[Any]]  # a row, and the modules that stand there


def _below(above: Row, form: Form, modules: list[Any]) -> list[_Line]:
    """The lines for what is inside some modules, in the order in which each begins."""
    alike: dict[Any, list[int]] = {}
    for number, (path, _, look) in enumerate(form.held):
        alike.setdefault((*look, is_private(path)), []).append(number)
    groups = [
        (look, product, [numbers[place] for place in places])
        for look, numbers in alike.items()
        for product, places in fold([form.held[number][0] for number in numbers])
    ]
    lines: list[_Line] = []
    for look, product, numbers in sorted(groups, key=lambda group: group[2][0]):
        ways = [form.held[number][1] for number in numbers]
        row = Row(above, product, above.count * len(ways), *look)
        held = [reduce(_inner, way, module) for module in modules for way in ways if row.form]
        lines.append((row, held))
    return lines


def _inner(container: Container, key: Any) -> Any:
    return value_at(unwrapped(container), key)
