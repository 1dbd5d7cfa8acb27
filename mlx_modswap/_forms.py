"""What a module looks like, made from the inside out, so that equal ones are found at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import _hints
from ._locations import Container, entries, opened
from ._measure import Measure, measure_own

_ARRAY = mx.array
_NOTHING = Measure()
_PLAIN = {int, float, str, bool}
_LONGEST = 48  # text of numbers
_USUAL = re.compile(
    r",? ?\b(\w+=False|mode=affine|affine=True|padding=(0|\(0(, 0)+\))"
    r"|(stride|dilation|groups)=(1|\(1(, 1)+\)))(?=,|$)"
)
_ATTRIBUTES = {  # what modules without an `_extra_repr` have to say
    "num_heads": "{} heads",
    "n_heads": "{} heads",
    "num_attention_heads": "{} heads",
    "n_kv_heads": "{} kv heads",
    "num_kv_heads": "{} kv heads",
    "num_key_value_heads": "{} kv heads",
    "num_experts": "{} experts",
    "n_routed_experts": "{} experts",
    "input_dims": "input_dims={}",
    "output_dims": "output_dims={}",
    "group_size": "group_size={}",
    "bits": "bits={}",
}


class Form:
    """What containers look like that look the same.

    Attributes:
        example (Container): One of them.
        marked (frozenset): The keys of what is marked in it.
        text (str): Its class and the numbers that matter.
        own (Measure): What it holds without the modules inside.
        solid (bool): Whether it has parameters.
        modules (int): How many modules there are inside.
    """

    __slots__ = ("example", "marked", "modules", "own", "solid", "text")

    def __init__(self, example: Container, held: list[Any], marked: frozenset[Any]):
        self.example = example
        self.marked = marked
        self.text = type(example).__name__
        self.own = _NOTHING
        is_module = isinstance(example, nn.Module)
        if is_module:
            numbers = _numbers(example)
            self.text += f"({numbers})" if numbers else ""
            self.own, _ = measure_own(example)
        inner = [(key, what) for key, what, *_ in held if isinstance(what, Form)]
        self.solid = self.own.params > 0 or any(
            what.solid and not (is_module and str(key).startswith("_")) for key, what in inner
        )
        self.modules = sum(what.modules + isinstance(what.example, nn.Module) for _, what in inner)


def forms_of(
    order: list[Container], marked: dict[int, set[Any]], shared: set[int]
) -> dict[int, Form]:
    """The form of each container, by ``id``.

    Args:
        order (list): The containers, each before what it holds.
        marked (dict): The keys of what is marked, by the ``id`` of what holds it.
        shared (set): The ``id`` of each container, but no wrapper, that is in several places.
    """
    forms: dict[int, Form] = {}
    known: dict[Any, Form] = {}
    alike: dict[Any, Form] = {}
    settings: dict[int, Any] = {}  # of lists and dicts
    for container in reversed(order):
        held: list[Any] = []
        state: list[Any] = []  # what a text may tell of
        for key, value in entries(container):
            if type(value) is _ARRAY:
                held.append((key, value.shape, value.dtype))
            elif form := forms.get(id(value)):
                held.append((key, form, id(opened(value)) in shared))
                state.append(settings.get(id(value)))
            else:
                if text := stand_in(value):
                    held.append((key, text))
                state.append((key, _setting(value)))
        if isinstance(container, nn.Module):
            state += ((name, _setting(value)) for name, value in vars(container).items())
        else:
            settings[id(container)] = tuple(state)
        marks = frozenset(marked.get(id(opened(container)), ()))
        look = type(container), tuple(held), marks, tuple(state)
        form = known.get(look)
        if form is None:
            form = Form(container, held, marks)
            # Of the attributes only what the picture shows makes a difference.
            seen = (*look[:3], form.text, form.own, tuple(functions(container)))
            form = known[look] = alike.setdefault(seen, form)
        forms[id(container)] = form
    return forms


def _setting(value: Any) -> Any:
    if type(value) is set:  # such as the names of what is frozen
        return frozenset(value)
    return value if type(value) in _PLAIN else id(value)


# ---------------------------------------------------------------- the numbers that matter


def _numbers(module: nn.Module) -> str:
    try:
        text = module._extra_repr() or _attributes(module)
    except Exception:  # code of the model, which may rely on what is not there
        return ""
    text = re.sub(r"input_dims=(\d+), output_dims=(\d+)", r"\1 -> \2", text)
    text = _USUAL.sub("", text).replace("=True", "").strip(", ")
    text = "".join(character for character in text if character.isprintable())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _attributes(module: nn.Module) -> str:
    texts: dict[str, int] = {}
    for name, text in _ATTRIBUTES.items():
        value = getattr(module, name, None)
        if type(value) is int:
            texts.setdefault(text, value)
    words = [text.format(value) for text, value in texts.items()]
    arrays = [(str(key), v.shape) for key, v in dict.items(module) if _is_public(key, v)]
    if len(arrays) <= 3 and not texts.keys() & {"input_dims={}", "bits={}"}:
        words += [f"{key} {'x'.join(map(str, shape)) or 'scalar'}" for key, shape in arrays]
    return ", ".join(words)


def _is_public(key: Any, value: Any) -> bool:
    return type(value) is _ARRAY and not str(key).startswith("_")


# ---------------------------------------------------------------- what is no module to MLX


def stand_in(value: Any) -> str:
    """What to call a value that stands where a module could, or ``''``."""
    if value is None:
        return "None"
    if isinstance(value, tuple):
        modules = _modules_in(value)
        return f"tuple of {_hints.classes(modules)}, which MLX does not see" if modules else ""
    if callable(value) and not isinstance(value, (type, dict)):
        name = getattr(value, "__name__", None)
        return f"function {name}" if isinstance(name, str) else "function"
    return ""


def _modules_in(value: tuple[Any, ...]) -> list[nn.Module]:
    found: list[Any] = [value]
    for one in found:
        if isinstance(one, (tuple, list)):
            found.extend(one)
    return [one for one in found if issubclass(type(one), nn.Module)]


def functions(container: Container) -> Iterator[tuple[str, str]]:
    """The public attributes of a module that are functions, where others hold a module."""
    if isinstance(container, nn.Module):
        for name, value in vars(container).items():
            if value is not None and not name.startswith("_") and (text := stand_in(value)):
                yield name, text
