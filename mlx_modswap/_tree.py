"""A model -> a picture of it that fits on a screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.nn as nn

from . import _hints
from ._fold import Entry, Product, fold, inside
from ._forms import Form, forms_of, functions, stand_in
from ._locations import Container, Sharing, entries, is_container, opened
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
    marked: dict[int, set[Any]] = {}  # keys by the id of their container
    chosen_by, selected = "", None
    if narrowed or not isinstance(pattern, str) or pattern != "**":
        places = choose(model, patterns, where, excludes, strict=True)
        selected = len(places.paths)
        for holder, key in places.locations():
            marked.setdefault(holder, set()).add(key)
        chosen_by = _hints.listed(one.text for one in patterns)
        chosen_by += " with " * bool(narrowed) + " and ".join(narrowed)
    order = Sharing(model).order  # there are no more paths than anyone can walk
    shared = _shared(order)
    forms = forms_of(order, marked, shared)
    frozen = any(map(_is_frozen, set(forms.values())))
    return Tree(_rows(model, forms, shared), chosen_by, selected, frozen)


def _is_frozen(form: Form) -> bool:
    """Whether something is frozen there that need not be, as quantized arrays must."""
    return form.own.trainable < form.own.params and "bits" not in vars(form.example)


def _shared(order: list[Container]) -> set[int]:
    """The ids of what is in several places, or in a list or dict that is."""
    seen, shared = set[int](), set[int]()
    for container in order:
        if opened(container) is not container:  # a wrapper is where its layer is
            continue
        is_again = id(container) in shared and not isinstance(container, nn.Module)
        for key in (id(opened(one)) for _, one in entries(container) if is_container(one)):
            if is_again or key in seen:
                shared.add(key)
            seen.add(key)
    return shared


class _Group(NamedTuple):
    """Places inside a module that look the same."""

    form: Form | None  # None if it is no module
    text: str
    marked: bool = False
    private: bool = False
    tied: bool = False
    product: Product = ()
    ways: Sequence[tuple[Any, ...]] = ((),)  # the keys that lead to each


def _groups(form: Form, forms: dict[int, Form], shared: set[int]) -> list[_Group]:
    """What is inside a module, in the order in which each group begins."""
    alike: dict[_Group, list[tuple[int, Entry]]] = {}
    for number, entry in enumerate(inside(form.example)):
        inner = forms.get(id(entry.value))
        text = inner.text if inner else stand_in(entry.value)
        if text and not _is_nothing(entry):
            marked = entry.keys[-1] in forms[id(entry.holder)].marked
            private = str(entry.path[0]).startswith("_")
            tied = inner is not None and inner.solid and id(opened(entry.value)) in shared
            group = _Group(inner, text, marked, private, tied)
            alike.setdefault(group, []).append((number, entry))
    groups: dict[int, _Group] = {}
    for group, found in alike.items():
        for product, places in fold([entry.path for _, entry in found]):
            ways = tuple(found[place][1].keys for place in places)
            groups[found[places[0]][0]] = group._replace(product=product, ways=ways)
    others = [_Group(None, text, product=((name,),)) for name, text in functions(form.example)]
    return [groups[number] for number in sorted(groups)] + others


def _is_nothing(entry: Entry) -> bool:
    """Whether a ``None`` stands there, and not in a list of modules."""
    if entry.value is not None:
        return False
    holder = entry.holder
    return not (isinstance(holder, list) and any(map(is_container, list.__iter__(holder))))


def _rows(model: nn.Module, forms: dict[int, Form], shared: set[int]) -> list[Row]:
    """The picture, line by line. What comes again is not counted again."""
    firsts: dict[int, Row] = {}  # where each module with parameters is first, if some are shared
    hidden: set[Row] = set()
    rows: list[Row] = []
    whole = _Group(forms[id(model)], forms[id(model)].text)
    waiting: list[tuple[Row | None, _Group, list[Any]]] = [(None, whole, [model])]
    while waiting:
        above, group, modules = waiting.pop()
        row = Row(above, group.product, group.text, len(modules), group.marked, group.private)
        rows.append(row)
        if group.private or above in hidden:
            hidden.add(row)
        form = group.form
        if form is None:
            continue
        row.look = id(form)
        row.modules = form.modules * row.count
        if form.solid and group.private:
            row.note = "not in parameters()"
        if group.tied:
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
            row.params, row.trainable, row.nbytes = (len(modules) * n for n in form.own[1:4])
            row.dtypes.update(form.own.dtypes)
            for inner in reversed(_groups(form, forms, shared)):
                held = [_at(module, way) for module in modules for way in inner.ways]
                waiting.append((row, inner, held))
    for row in reversed(rows):
        if row.above is not None:
            row.above.add(row)
    return rows


def _at(module: Container, way: tuple[Any, ...]) -> Any:
    value: Any = module
    for key in way:
        value = opened(value)
        is_dict = isinstance(value, dict)
        value = dict.__getitem__(value, key) if is_dict else list.__getitem__(value, key)
    return value
