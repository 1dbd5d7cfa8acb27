"""What a module looks like, made from the inside out, so that equal ones are found at once."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .._containers import (
    Container,
    Location,
    entries,
    is_container,
    is_private,
    own_values,
    unwrapped,
)
from .._errors import classes
from .._measure import measure_own
from .._sharing import Sharing

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
    """What modules look like that look the same.

    Attributes:
        text (str): Their class and the numbers that matter.
        own (Measure): What each holds without the modules inside.
        held (list): What stands inside of each: its path, the keys that lead to it, and
            what to show: a text, a form if it is a module, whether it is tied and marked.
        modules (int): How many modules there are inside.
        solid (bool): Whether it has parameters.
        frozen (bool): Whether something is frozen that need not be, as quantized arrays must.
    """

    __slots__ = ("frozen", "held", "modules", "own", "solid", "text")

    def __init__(self, example: nn.Module, held: list[Any]):
        numbers = _numbers(example)
        self.text = type(example).__name__ + (f"({numbers})" if numbers else "")
        self.own, _ = measure_own(example)
        self.held = held
        inner = [(path, form) for path, _, (_, form, _, _) in held if form]
        self.modules = sum(form.modules + 1 for _, form in inner)
        self.solid = self.own.params > 0 or any(
            form.solid and not is_private(path) for path, form in inner
        )
        self.frozen = any(form.frozen for _, form in inner) or (
            self.own.trainable < self.own.params and "bits" not in vars(example)
        )


def form_of(model: nn.Module, marked: set[Location]) -> Form:
    """The form of a model, made of those of all that is inside; ``marked`` are locations."""
    sharing = Sharing(model)  # there are no more paths than anyone can walk
    shared = _shared(sharing)
    forms: dict[int, Form] = {}  # of each module, by ``id``
    known: dict[Any, Form] = {}  # by all that a module holds
    alike: dict[Any, Form] = {}  # by what the picture shows of it
    for module in reversed(sharing.order):
        if not isinstance(module, nn.Module):
            continue
        held: list[Any] = []
        arrays: list[Any] = []
        state: list[Any] = []  # what a text may tell of
        for path, holder, keys, value in own_values(module):
            if type(value) is _ARRAY:
                arrays.append((path, value.shape, value.dtype))
            elif form := forms.get(id(value)):
                is_tied = form.solid and id(unwrapped(value)) in shared
                is_marked = (id(holder), keys[-1]) in marked
                held.append((path, keys, (form.text, form, is_tied, is_marked)))
            else:
                state.append((path, _setting(value)))
                if text := stand_in(value, holder):
                    held.append((path, keys, (text, None, False, False)))
        for key, value in vars(module).items():
            state.append((key, _setting(value)))
            if not key.startswith("_") and (text := stand_in(value, module)):
                held.append(((key,), (key,), (text, None, False, False)))
        look = type(module), tuple(held), tuple(arrays)
        form = known.get((look, tuple(state)))
        if form is None:
            form = Form(module, held)
            form = alike.setdefault((look, form.text, form.own), form)
            known[look, tuple(state)] = form
        forms[id(module)] = form
    return forms[id(model)]


def _shared(sharing: Sharing) -> set[int]:
    """The ids of what is in several places, or in a list or dict that is."""
    shared = {id(unwrapped(one)) for one in sharing.order if sharing.location_counts[id(one)] > 1}
    for container in sharing.order:  # each before what it holds
        if id(container) in shared and not isinstance(container, nn.Module):
            shared.update(id(unwrapped(one)) for _, one in entries(container) if is_container(one))
    return shared


def _setting(value: Any) -> Any:
    if type(value) is set:  # such as the names of what is frozen
        return frozenset(value)
    return (type(value), value) if type(value) in _PLAIN else id(value)


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
        return f"tuple of {classes(modules)}, which MLX does not see" if modules else ""
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
