"""Describe what modules look like, from the inside out, so that equal modules share a form."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .._model.containers import (
    Container,
    Keys,
    Location,
    Segments,
    entries,
    is_container,
    is_private,
    own_values,
    unwrapped,
)
from .._model.sharing import Sharing
from .._words import classes
from .measure import measure_alone

_ARRAY = mx.array
_LONGEST = 48  # characters of the figures of a module
_USUAL = re.compile(
    r",? ?\b(\w+=False|mode=affine|affine=True|padding=(0|\(0(, 0)+\))"
    r"|(stride|dilation|groups)=(1|\(1(, 1)+\)))(?=,|$)"
)
_ATTRIBUTES = {  # the figures of modules without an `_extra_repr`: the first of these attributes
    "{} heads": ("num_heads", "n_heads", "num_attention_heads"),
    "{} kv heads": ("n_kv_heads", "num_kv_heads", "num_key_value_heads"),
    "{} experts": ("num_experts", "n_routed_experts"),
    **{f"{name}={{}}": (name,) for name in ("input_dims", "output_dims", "group_size", "bits")},
}


class Appearance(NamedTuple):
    """What a line of the picture shows of a place.

    Attributes:
        text (str): The class and figures of a module, or a description of what else is there.
        form (Form, optional): The form of a module.
        tied (bool): Whether the module has parameters and is in other places, too.
        marked (bool): Whether the place is selected.
    """

    text: str
    form: Form | None = None
    tied: bool = False
    marked: bool = False


class Child(NamedTuple):
    """A place in a module: its path, the keys on the path, and what is there."""

    path: Segments
    keys: Keys
    appearance: Appearance


class Form:
    """The description shared by all modules that look the same.

    Attributes:
        text (str): Their class and the figures that matter.
        measure (Measure): What each of them holds without its children.
        children (list[Child]): The places in each of them.
        modules (int): How many descendants each of them has.
        has_parameters (bool): Whether each of them, or a descendant that is not private,
            has parameters.
        is_frozen (bool): Whether each of them, or a descendant, has frozen parameters that
            could be trained; the parameters of a quantized layer could not.
    """

    __slots__ = ("children", "has_parameters", "is_frozen", "measure", "modules", "text")

    def __init__(self, example: nn.Module, children: list[Child]):
        figures = _figures(example)
        self.text = type(example).__name__ + (f"({figures})" if figures else "")
        self.measure, _ = measure_alone(example)
        self.children = children
        inner = [(child.path, child.appearance.form) for child in children if child.appearance.form]
        self.modules = sum(form.modules + 1 for _, form in inner)
        self.has_parameters = self.measure.params > 0 or any(
            form.has_parameters and not is_private(path) for path, form in inner
        )
        self.is_frozen = any(form.is_frozen for _, form in inner) or (
            self.measure.trainable < self.measure.params and "bits" not in vars(example)
        )


def form_of(model: nn.Module, marked: set[Location]) -> Form:
    """Return the form of a model; ``marked`` are the locations that are selected.

    Modules that look the same share one ``Form`` object. So to compare two modules with
    everything inside them, it is enough to compare what they hold themselves, and the
    forms of their children by identity. The children need their forms first, so the
    loop goes over the model from the inside out, and over each module once: the time
    is linear in the size of the model, however many places a module is in. Whether a
    child is marked or tied is part of its appearance, so a selection inside one of several
    equal blocks gives that block another form, and its own line. What the picture does
    not show is not part of a form: blocks that store their own number still share a line.
    """
    sharing = Sharing(model)  # raises if the model has a cycle, or too many paths
    shared = _shared(sharing)
    forms: dict[int, Form] = {}  # of each module, by `id`
    different: dict[Any, Form] = {}
    for module in reversed(sharing.order):
        if not isinstance(module, nn.Module):
            continue
        children: list[Child] = []
        arrays: list[Any] = []
        for path, holder, keys, value in own_values(module):
            if type(value) is _ARRAY:
                arrays.append((path, value.shape, value.dtype))
            elif form := forms.get(id(value)):
                is_tied = form.has_parameters and id(unwrapped(value)) in shared
                is_marked = (id(holder), keys[-1]) in marked
                children.append(Child(path, keys, Appearance(form.text, form, is_tied, is_marked)))
            elif text := placeholder(value, holder):
                children.append(Child(path, keys, Appearance(text)))
        for key, value in vars(module).items():
            if not key.startswith("_") and (text := placeholder(value, module)):
                children.append(Child((key,), (key,), Appearance(text)))
        form = Form(module, children)
        appearance = form.text, form.measure, tuple(arrays), tuple(children)
        forms[id(module)] = different.setdefault(appearance, form)
    return forms[id(model)]


def _shared(sharing: Sharing) -> set[int]:
    """Return the ids of the containers in several places, or in a list or dict that is."""
    shared = {id(unwrapped(one)) for one in sharing.order if sharing.location_counts[id(one)] > 1}
    for container in sharing.order:  # each before what it holds
        if id(container) in shared and not isinstance(container, nn.Module):
            shared.update(id(unwrapped(one)) for _, one in entries(container) if is_container(one))
    return shared


# ---------------------------------------------------------------- the figures that matter


def _figures(module: nn.Module) -> str:
    try:
        text = module._extra_repr() or _attributes(module)
    except Exception:  # code of the model, which may use attributes that do not exist
        return ""
    text = re.sub(r"input_dims=(\d+), output_dims=(\d+)", r"\1 -> \2", text)
    text = _USUAL.sub("", text).replace("=True", "").strip(", ")
    text = "".join(character for character in text if character.isprintable())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _attributes(module: nn.Module) -> str:
    figures: dict[str, int] = {}
    for text, names in _ATTRIBUTES.items():
        candidates = [getattr(module, name, None) for name in names]
        figures.update((text, value) for value in reversed(candidates) if type(value) is int)
    words = [text.format(value) for text, value in figures.items()]
    arrays = [(str(key), v.shape) for key, v in dict.items(module) if type(v) is _ARRAY]
    arrays = [(key, shape) for key, shape in arrays if not key.startswith("_")]
    if len(arrays) <= 3 and not figures.keys() & {"input_dims={}", "bits={}"}:
        words += [f"{key} {'x'.join(map(str, shape)) or 'scalar'}" for key, shape in arrays]
    return ", ".join(words)


# ---------------------------------------------------------------- what is not a module to MLX


def placeholder(value: Any, holder: Container) -> str:
    """Describe a value that is where a module could be; ``''`` if it is not shown."""
    if value is None:  # an entry that was left out, if the list has other entries
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
