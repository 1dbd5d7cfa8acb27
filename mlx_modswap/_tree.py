"""A model -> a picture of it that fits on a screen."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from . import _hints
from ._fold import attributes, fold, inside
from ._forms import Form, forms_of, stand_in
from ._locations import Container, Location, Sharing, entries, is_container, opened
from ._measure import Measure, total
from ._picture import Row, Tree
from ._select import Patterns, Where, check_model, choose, parse_argument


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
    patterns, excludes = parse_argument("pattern", pattern), parse_argument("exclude", exclude)
    narrowed = ["where"] * (where is not None) + ["exclude"] * bool(excludes)
    marked: set[Location] = set()
    chosen_by, selected = "", None
    if narrowed or not isinstance(pattern, str) or pattern != "**":
        places = choose(model, patterns, where, excludes, strict=True)
        selected = len(places.paths)
        marked.update(places.locations())
        chosen_by = _hints.listed(one.text for one in patterns)
        chosen_by += " with " * bool(narrowed) + " and ".join(narrowed)
    sharing = Sharing(model)  # there are no more paths than anyone can walk
    shared = _shared(sharing)
    forms = forms_of(sharing.order, marked, shared)
    frozen = any(map(_is_frozen, set(forms.values())))
    return Tree(_rows(model, forms, marked, shared), chosen_by, selected, frozen)


def _is_frozen(form: Form) -> bool:
    """Whether something is frozen there that need not be, as quantized arrays must."""
    return form.own.trainable < form.own.params and "bits" not in vars(form.example)


def _shared(sharing: Sharing) -> set[int]:
    """The ids of what is in several places, or in a list or dict that is."""
    shared = {id(opened(one)) for one in sharing.order if sharing.holders[id(one)] > 1}
    for container in sharing.order:  # each before what it holds
        if id(container) in shared and not isinstance(container, nn.Module):
            shared.update(id(opened(one)) for _, one in entries(container) if is_container(one))
    return shared


def _rows(
    model: nn.Module, forms: dict[int, Form], marked: set[Location], shared: set[int]
) -> list[Row]:
    """The picture, line by line. What comes again is not counted again."""
    firsts: dict[int, Row] = {}  # where each module with parameters is first, if some are shared
    hidden: set[Row] = set()
    rows: list[Row] = []
    form = forms[id(model)]
    waiting: list[_Line] = [(Row(None, (), 1, form.text), form, False, [model])]
    while waiting:
        row, form, is_tied, modules = waiting.pop()
        rows.append(row)
        if row.private or row.above in hidden:
            hidden.add(row)
        if form is None:
            continue
        row.look = id(form)
        row.modules = form.modules * row.count
        if form.solid and row.private:
            row.note = "not in parameters()"
        if is_tied:
            different = {id(opened(module)): module for module in modules}
            modules = [module for key, module in different.items() if key not in firsts]
            row.note = "tied"
            if not modules:
                row.note += f" to {firsts[next(iter(different))].path}"
            elif len(modules) < row.count:
                fresh = len(modules)
                row.note += ", one module" if fresh == 1 else f", {fresh} modules"
            if row not in hidden:
                firsts.update((id(opened(module)), row) for module in modules)
        if modules:
            params, trainable, nbytes = (len(modules) * number for number in form.own[1:4])
            row.held = Measure(row.text, params, trainable, nbytes, form.own.dtypes)
            waiting.extend(reversed(_below(row, form, modules, forms, marked, shared)))
    for row in reversed(rows):
        if row.above:
            row.above.selected += row.selected
            if not row.private:
                row.above.held = total([row.above.held, row.held])
    return rows


# A row, the form of what stands there if that is a module, whether it is tied, the modules.
_Line = tuple[Row, Form | None, bool, list[Any]]


def _below(
    above: Row,
    form: Form,
    modules: list[Any],
    forms: dict[int, Form],
    marked: set[Location],
    shared: set[int],
) -> list[_Line]:
    """The lines for what is inside some modules, in the order in which each begins."""
    entries = [*inside(form.example), *attributes(form.example)]
    alike: dict[Any, list[int]] = {}
    for number, (path, holder, keys, value) in enumerate(entries):
        inner = forms.get(id(value))
        if text := inner.text if inner else stand_in(value, holder):
            is_marked = (id(opened(holder)), keys[-1]) in marked
            is_private = str(path[0]).startswith("_")
            is_tied = inner is not None and inner.solid and id(opened(value)) in shared
            look = inner, is_tied, text, is_marked, is_private
            alike.setdefault(look, []).append(number)
    groups = [
        (look, product, [numbers[place] for place in places])
        for look, numbers in alike.items()
        for product, places in fold([entries[number].path for number in numbers])
    ]
    lines: list[_Line] = []
    for look, product, numbers in sorted(groups, key=lambda group: group[2][0]):
        inner, is_tied, *others = look
        ways = [entries[number].keys for number in numbers]
        row = Row(above, product, len(modules) * len(ways), *others)
        held = [_at(module, way) for module in modules for way in ways] if inner else []
        lines.append((row, inner, is_tied, held))
    return lines


def _at(module: Container, way: tuple[Any, ...]) -> Any:
    value: Any = module
    for key in way:
        value = opened(value)
        is_dict = isinstance(value, dict)
        value = dict.__getitem__(value, key) if is_dict else list.__getitem__(value, key)
    return value
