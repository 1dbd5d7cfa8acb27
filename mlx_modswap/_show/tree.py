"""Draw a model so that the picture fits on a screen."""

from __future__ import annotations

from functools import reduce
from typing import Any

import mlx.nn as nn

from .._model.containers import Container, Location, is_private, unwrapped, value_at
from .._patterns.fold import fold
from .._select.arguments import Patterns, Rule, Where, check_model, parse_argument
from .._select.select import choose
from .._words import listed
from .forms import Appearance, Form, form_of
from .measure import total
from .picture import Row, Tree


def tree(
    model: nn.Module,
    pattern: Patterns = "**",
    *,
    where: Where | None = None,
    exclude: Patterns = (),
) -> Tree:
    """Draw a model, and mark what a pattern selects.

    Places that look the same share a line, which starts with their pattern:
    ``layers[0:32]`` represents 32 equal layers. The figures on a line are the sums
    over all of its places. A module in several places is counted only at the first one.

    If a model would not fit on a screen, some lines are collapsed. A collapsed line
    says how many modules are inside, or which other line looks the same; to see more,
    draw that part of the model alone. Values that MLX does not see as modules, but that
    are where a module could be (a function, ``None``, modules in a tuple), are shown too.

    Args:
        model (mlx.nn.Module): The model to draw. The picture keeps no reference to it.
        pattern (str, re.Pattern or an iterable of them): What to mark, as in
            :func:`select`. Default: ``"**"``, which by itself marks nothing.
        where (type, tuple of types or Callable, optional): See :func:`select`.
            Default: ``None``.
        exclude (str, re.Pattern or an iterable of them): See :func:`select`.
            Default: ``()``.

    Returns:
        Tree: A picture to print. In a notebook its lines can be expanded.

    Raises:
        PatternError: If the text of a pattern is wrong.
        NoMatchError: If a pattern, ``exclude`` or ``where`` does nothing.
        SelectionError: If the model contains a cycle.
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
    return Tree(_rows(model, form), chosen_by, selected, form.is_frozen)


def _rows(model: nn.Module, form: Form) -> list[Row]:
    """Return every line of the picture, top-down. A module in several places is counted once."""
    first_rows: dict[int, Row] = {}  # where each tied module is counted, by `id`
    rows: list[Row] = []
    waiting: list[tuple[Row, Modules]] = [(Row(None, (), 1, form.text, form), [model])]
    while waiting:
        row, modules = waiting.pop()
        rows.append(row)
        if row.form is None:
            continue
        if row.form.has_parameters and row.private:
            row.note = "not in parameters()"
        if row.tied:
            different = {id(unwrapped(module)): module for module in modules}
            modules = [module for key, module in different.items() if key not in first_rows]
            row.note = "tied"
            if not modules:
                row.note += f" to {first_rows[next(iter(different))].pattern}"
            elif len(modules) < row.count:
                row.note += ", one module" if len(modules) == 1 else f", {len(modules)} modules"
            if not row.uncounted:
                first_rows.update((id(unwrapped(module)), row) for module in modules)
        if modules:
            row.measure = total([row.form.measure] * len(modules))
            waiting.extend(reversed(_child_rows(row, row.form, modules)))
    for row in reversed(rows):
        if row.parent:
            row.parent.selected += row.selected
            if not row.private:
                row.parent.measure = total([row.parent.measure, row.measure])
    return rows


Modules = list[Any]  # what is at the places of a row


def _child_rows(parent: Row, form: Form, modules: Modules) -> list[tuple[Row, Modules]]:
    """Return the lines directly below a line and their modules, in the order of first places."""
    same: dict[tuple[Appearance, bool], list[int]] = {}
    for position, child in enumerate(form.children):
        same.setdefault((child.appearance, is_private(child.path)), []).append(position)
    groups = [
        (appearance, private, product, [positions[at] for at in chosen])
        for (appearance, private), positions in same.items()
        for product, chosen in fold([form.children[position].path for position in positions])
    ]
    rows: list[tuple[Row, Modules]] = []
    for appearance, private, product, positions in sorted(groups, key=lambda group: group[3][0]):
        row = Row(parent, product, parent.count * len(positions), *appearance, private)
        all_keys = [form.children[position].keys for position in positions]
        inner = [reduce(_entry, keys, module) for module in modules for keys in all_keys]
        rows.append((row, inner))
    return rows


def _entry(container: Container, key: Any) -> Any:
    return value_at(unwrapped(container), key)
