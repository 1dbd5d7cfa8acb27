"""What a module looks like, made from the inside out, so that equal ones are found at once."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import _hints
from ._locations import Container, Location, entries, is_container, opened
from ._measure import NOTHING, measure_own

_ARRAY = mx.array
_PLAIN = {int, float, str, bool}
_LONGEST = 48  # text of numbers
_USUAL = re.compile(
    r",? ?\b(\w+=False|mode=affine|affine=True|padding=(0|\(0(, 0)+\))"
    r"|(stride|dilation|groups)=(1|\(1(, 1)+\)))(?=,|$)"
)
_ATTRIBUTES = {  # what modules without an `_extra_repr` have to say, and where: the first counts
    "{} heads": ("num_heads", "n_heads", "num_attention_heads"),
    "{} kv heads": ("n_kv_heads", "num_kv_heads", "num_key_value_heads"),
    "{} experts": ("num_experts", "n_routed_experts"),
    **{f"{name}={{}}": (name,) for name in ("input_dims", "output_dims", "group_size", "bits")},
}


class Form:
    """What containers look like that look the same.

    Attributes:
        example (Container): One of them.
        text (str): Its class and the numbers that matter.
        own (Measure): What it holds without the modules inside.
        solid (bool): Whether it has parameters.
        modules (int): How many modules there are inside.
    """

    __slots__ = ("example", "modules", "own", "solid", "text")

    def __init__(self, example: Container, held: list[Any]):
        self.example = example
        self.text = type(example).__name__
        self.own = NOTHING
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


def forms_of(order: list[Container], marked: set[Location], shared: set[int]) -> dict[int, Form]:
    """The form of each container, by ``id``.

    Args:
        order (list): The containers, each before what it holds.
        marked (set): The locations that are marked.
        shared (set): The ``id`` of each container, but no wrapper, that is in several places.
    """
    forms: dict[int, Form] = {}
    known: dict[Any, Form] = {}  # by all that a container holds
    alike: dict[Any, Form] = {}  # by what the picture shows of it
    settings: dict[int, Any] = {}  # of lists and dicts
    for container in reversed(order):
        holder = id(opened(container))
        held: list[Any] = []
        state: list[Any] = []  # what a text may tell of
        for key, value in entries(container):
            if type(value) is _ARRAY:
                held.append((key, value.shape, value.dtype))
            elif form := forms.get(id(value)):
                held.append((key, form, id(opened(value)) in shared, (holder, key) in marked))
                state.append(settings.get(id(value)))
            else:
                state.append((key, _setting(value)))
                if text := stand_in(value, container):
                    held.append((key, text))
        if isinstance(container, nn.Module):
            for key, value in vars(container).items():
                state.append((key, _setting(value)))
                if not key.startswith("_") and (text := stand_in(value, container)):
                    held.append((key, text))
        else:
            settings[id(container)] = tuple(state)
        look = type(container), tuple(held)
        form = known.get((look, tuple(state)))
        if form is None:
            form = Form(container, held)
            form = alike.setdefault((look, form.text, form.own), form)
            known[look, tuple(state)] = form
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
    for text, names in _ATTRIBUTES.items():
        values = [getattr(module, name, None) for name in names]
        texts.update((text, value) for value in reversed(values) if type(value) is int)
    words = [text.format(value) for text, value in texts.items()]
    arrays = [(str(key), v.shape) for key, v in dict.items(module) if type(v) is _ARRAY]
    arrays = [(key, shape) for key, shape in arrays if not key.startswith("_")]
    if len(arrays) <= 3 and not texts.keys() & {"input_dims={}", "bits={}"}:
        words += [f"{key} {'x'.join(map(str, shape)) or 'scalar'}" for key, shape in arrays]
    return ", ".join(words)


# ---------------------------------------------------------------- what is no module to MLX


def stand_in(value: Any, holder: Container) -> str:
    """What to call a value that stands where a module could, or ``''``."""
    if value is None:  # an entry that was left out, if there are others
        among_others = isinstance(holder, list) and any(map(is_container, list.__iter__(holder)))
        return "None" if among_others else ""
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
