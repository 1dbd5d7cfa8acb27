"""Describe what a model is made of, without the values of its weights, and compare two models."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from itertools import takewhile
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..._hooks.wrapper import Wrapper, own_attributes
from ..._model.containers import wrapped_layers
from ..._patterns.fold import folded
from ..._select.select import select
from ..._words import listed
from .._adapters.kinds import KINDS

_PLAIN = (bool, int, float, complex, str, bytes, type(None), mx.Dtype, Enum)
# Entries of the config, or of its text_config, that some models keep. They are skipped: the layers
# show what they say. So is the folder, which mlx-vlm also keeps.
_ABOUT_LAYERS = frozenset({"quantization", "quantization_config", "model_path"})

Classes = tuple[type, ...]  # of a module and of the layers under it, if it is a Wrapper


class Spec(NamedTuple):
    """What is the same of two arrays that differ only in their values."""

    dtype: mx.Dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('mlx.core.')} {self.shape}"


class Outline(NamedTuple):
    """What a model is made of.

    Attributes:
        classes (dict): The class of the module at each path, followed by the classes of
            the layers under a Wrapper; ``""`` is the model.
        attributes (dict): What the module at each path has besides modules and
            parameters, in words, by name.
        arrays (dict): The dtype and shape of each parameter, by name.
        constants (dict): The arrays that are not parameters, by path and name.
    """

    classes: dict[str, Classes]
    attributes: dict[str, dict[str, str]]
    arrays: dict[str, Spec]
    constants: dict[tuple[str, str], mx.array]


def outline(model: nn.Module) -> Outline:
    """Describe a model without computing anything."""
    modules = {"": model, **select(model, "**", strict=False)}
    parameters: Any = tree_flatten(model.parameters())
    return Outline(
        {path: _classes(module) for path, module in modules.items()},
        {path: dict(_attributes(module)) for path, module in modules.items()},
        {name: Spec(array.dtype, array.shape) for name, array in parameters},
        {
            (path, name): value
            for path, module in modules.items()
            for name, value in _held(module)
            if isinstance(value, mx.array)
        },
    )


def _classes(module: nn.Module) -> Classes:
    return (type(module), *map(type, wrapped_layers(module)))


def _attributes(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in _held(module):
        if is_dataclass(value):  # the arguments of the model: each field is an entry of the config
            for field in fields(value):
                if field.name not in _ABOUT_LAYERS:
                    yield f"{name}.{field.name}", _in_words(getattr(value, field.name))
        elif name not in _ABOUT_LAYERS:
            yield name, _in_words(value)


def _held(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what a module, and each layer under a Wrapper, has besides modules and parameters."""
    around = ""
    for layer in (module, *wrapped_layers(module)):
        held = _of_wrapper(layer) if issubclass(type(layer), Wrapper) else _of_module(layer)
        yield from ((around + name, value) for name, value in held)
        around += "__wrapped__."


def _of_wrapper(wrapper: Any) -> Iterator[tuple[str, Any]]:
    for name, value in own_attributes(wrapper).items():
        if name.isidentifier():  # the library's own names are not
            yield name, value


def _of_module(module: Any) -> Iterator[tuple[str, Any]]:
    # MLX keeps arrays, modules, lists and dicts in the module, which is a dict, and everything else
    # in its `__dict__`. Of the private names, arrays and numbers are constants, as in a RoPE; the
    # others belong to MLX, or are made anew when they are needed.
    for name, value in {**vars(module), **module}.items():
        if name.startswith("_"):
            is_held = isinstance(value, (mx.array, float))
        else:
            is_held = not isinstance(value, (mx.array, nn.Module))
        if is_held:
            yield name, value


def _in_words(value: Any) -> str:
    """Describe a value in words that are equal for two models if the value is equal."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, mx.array):
        return str(Spec(value.dtype, value.shape))
    # A module is a mapping too, but what it holds is described at its own path.
    if isinstance(value, Mapping) and not isinstance(value, nn.Module):
        left_out = {*_ABOUT_LAYERS, "vision_config"}  # mlx-lm does not write it
        # A config is sorted when it is written.
        kept = {repr(key): _in_words(one) for key, one in value.items() if key not in left_out}
        return "{" + ", ".join(f"{key}: {one}" for key, one in sorted(kept.items())) + "}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_in_words, value))})"
    if isinstance(value, (type, FunctionType, BuiltinFunctionType, MethodType)):
        return value.__qualname__
    return type(value).__name__


# ---------------------------------------------------------------- differences


def difference(
    built: Outline, model: Outline, original: Outline | None = None, by: str = "mlx-lm"
) -> str:
    """Say how a model differs from what its loader builds, and what to do about it.

    Args:
        built (Outline): What the loader builds.
        model (Outline): The model.
        original (Outline, optional): What the loader would build with the config that the model
            was loaded with, if some of its entries may have changed.
        by (str): The name of the loader.

    Returns:
        str: The differences in words, or ``""``.
    """
    return (
        other_layers(built, model, by)
        or _other_attributes(built, model, original, by)
        or _other_arrays(built.arrays, model.arrays, by)
        or _other_constants(built, model, by)
    )


def other_layers(built: Outline, model: Outline, by: str = "mlx-lm") -> str:
    """Say where a loader would build modules of other classes than a model has."""
    differing: dict[tuple[Classes, Classes], list[str]] = {}
    seen: set[str] = set()
    for path in dict.fromkeys([*model.classes, *built.classes]):
        one, other = built.classes.get(path, ()), model.classes.get(path, ())
        if len(one) == len(other) and all(map(_is_same, one, other)):
            continue
        seen.add(path)
        if not any(above in seen for above in _above(path)):  # the one above says enough
            differing.setdefault((one, other), []).append(path)
    if not differing:
        return ""
    if whole := _is_part(built, model):
        return f"{whole} of what {by} would build: save the whole model"
    named = [(_names(*classes), paths) for classes, paths in differing.items()]
    texts = [
        f"{by} would build {one} at {listed(_at(paths), 4)}, but the model has {other}"
        for (one, other), paths in named
    ]
    if all(() in classes for classes in differing):
        advice = "pass the changed config entries: config={...}"
        if any(name.endswith(".text_config") for name in model.attributes.get("", ())):
            advice += "; if they are in its 'text_config', pass the complete 'text_config'"
        if all(one == () for one, _ in differing):
            advice += "; if calling the model has added them, load it anew and save it uncalled"
    else:
        advice = "fuse or unwrap it, or pass a model_file"
        if any((kind.adapter,) in classes for kind in KINDS for classes in differing):
            advice += "; lm.save_adapters writes the adapters alone"
    return f"{listed(texts, 4, ', and ')}: {advice}"


def _is_part(built: Outline, model: Outline) -> str:
    """Say which part of a built model a model is; ``""`` if it is not a part of it."""
    classes = model.classes[""]
    if classes == built.classes[""]:
        return ""
    paths = [path for path, others in built.classes.items() if path and others == classes]
    return f"the model is only the {_name(classes)} at {paths[0]!r}" if paths else ""


def _above(path: str) -> Iterator[str]:
    """Yield the paths of the modules around a path, the model first."""
    if path:
        yield ""
    parts = path.split(".")
    yield from (".".join(parts[:length]) for length in range(1, len(parts)))


def _is_same(one: type, other: type) -> bool:
    """Return whether two classes are the same, or come from two runs of the same file.

    mlx-lm runs a ``model_file`` anew for each model, so the classes that it defines are
    not in any imported Python module. Such classes are compared by their names.
    """
    if one is other:
        return True
    if one.__qualname__ != other.__qualname__:
        return False
    return getattr(sys.modules.get(one.__module__), one.__name__, None) is not one


def _names(one: Classes, other: Classes) -> tuple[str, str]:
    """Return the names of two classes, in more words if they would be the same."""
    if not one or not other or one[0].__name__ != other[0].__name__:
        return _name(one), _name(other)
    if _is_same(one[0], other[0]):  # the layers under them differ
        return _nested(one), _nested(other)
    return _full_name(one), _full_name(other)


def _name(classes: Classes) -> str:
    return classes[0].__name__ if classes else "nothing"


def _full_name(classes: Classes) -> str:
    return f"{classes[0].__module__}.{classes[0].__qualname__}"


def _nested(classes: Classes) -> str:
    return "(".join(cls.__name__ for cls in classes) + ")" * (len(classes) - 1)


def _other_attributes(built: Outline, model: Outline, original: Outline | None, by: str) -> str:
    differing: dict[tuple[str, str, str], list[str]] = {}
    old = _old_attributes(model, original) if original else set[tuple[str, str, str]]()
    old_arguments = _old_arguments(model, original) if original else set[tuple[str, str]]()
    for path, name, one, other in _unequal_attributes(built, model):
        # The model may still have the values of its old config, its own or in its blocks.
        if (path, name, other) not in old and (name, other) not in old_arguments:
            differing.setdefault((name, *_shortened(one, other)), []).append(path)
    texts = [
        f"{by} would set {name} of {listed(_at(paths), 4)} to {one}, but the model has {other}"
        for (name, one, other), paths in differing.items()
    ]
    advice = "set it in the model, or pass the config entry that sets it: config={...}"
    return f"{listed(texts, 4, ', and ')}: {advice}" if texts else ""


def _unequal_attributes(built: Outline, model: Outline) -> Iterator[tuple[str, str, str, str]]:
    """Yield path and name of each attribute that differs, and its value in both models."""
    for path, attributes in model.attributes.items():
        anew = built.attributes[path]
        for name in dict.fromkeys([*attributes, *anew]):
            one, other = anew.get(name, "nothing"), attributes.get(name, "nothing")
            may_be_of_a_run = _is_private(name) or (path, name) in model.constants
            if one != other and not (may_be_of_a_run and one in ("nothing", "None")):
                yield path, name, one, other


def _old_attributes(model: Outline, original: Outline) -> set[tuple[str, str, str]]:
    """Return the old attributes of the modules in which modules were added or removed.

    An attribute may be the number of these, and the model may still have the old number.
    """
    changed = model.classes.keys() ^ original.classes.keys()
    return {
        (path, name, text)
        for path in {above for path in changed for above in _above(path)}
        for name, text in original.attributes.get(path, {}).items()
        if not _is_argument(name)
    }


def _old_arguments(model: Outline, original: Outline) -> set[tuple[str, str]]:
    """Return the arguments that a model had, if it has other modules or shapes than it had.

    The arguments from which it was built then no longer describe it. If modules and shapes
    are the same, what has changed in the config may be what the model computes with. So may
    a bool in any case: models with a head of their own read ``args.tie_word_embeddings``.
    """
    if model.classes.keys() == original.classes.keys() and not _has_other_shapes(model, original):
        return set()
    attributes = [one for held in original.attributes.values() for one in held.items()]
    return {
        (name, text)
        for name, text in attributes
        if _is_argument(name) and text not in ("True", "False")
    }


def _has_other_shapes(model: Outline, original: Outline) -> bool:
    # The last dimension is left out, because a quantized layer packs it.
    both = model.arrays.keys() & original.arrays.keys()
    return any(model.arrays[name].shape[:-1] != original.arrays[name].shape[:-1] for name in both)


def _is_argument(name: str) -> bool:
    """Return whether an attribute is an entry of the config, such as ``args.vocab_size``."""
    return "." in name and not name.startswith("__wrapped__.")


def _is_private(name: str) -> bool:
    return name.rpartition(".")[2].startswith("_")


def _shortened(one: str, other: str, most: int = 60) -> tuple[str, str]:
    """Return two texts; if one is long, only the part of each that starts where they differ."""
    if max(len(one), len(other)) <= most:
        return one, other
    same = len(list(takewhile(lambda both: both[0] == both[1], zip(one, other))))
    start = one[:same].rfind(" ") + 1
    return f"...{one[start : start + most]}...", f"...{other[start : start + most]}..."


def _other_arrays(built: dict[str, Spec], model: dict[str, Spec], by: str) -> str:
    differing: dict[tuple[Spec | None, Spec | None], list[str]] = {}
    for name in dict.fromkeys([*model, *built]):
        one, other = built.get(name), model.get(name)
        if one != other:
            differing.setdefault((one, other), []).append(name)
    texts = [
        f"{by} would build {one or 'nothing'} at {listed(_at(names), 4)}, but the model has "
        f"{other or 'nothing'}"
        for (one, other), names in differing.items()
    ]
    return listed(texts, 4, ", and ")


def _other_constants(built: Outline, model: Outline, by: str) -> str:
    differing: dict[str, list[str]] = {}
    for (path, name), other in model.constants.items():
        one = built.constants.get((path, name))
        # The same formula gives slightly other values on the CPU than on the GPU.
        if one is not None and not (one.shape == other.shape and _is_close(one, other)):
            differing.setdefault(name, []).append(path)
    texts = [
        f"{by} would give {name} of {listed(_at(paths), 4)} other values than the model has"
        for name, paths in differing.items()
    ]
    advice = "set them in the model, or pass the config entry that sets them: config={...}"
    return f"{listed(texts, 4, ', and ')}: {advice}" if texts else ""


def _is_close(one: mx.array, other: mx.array) -> bool:
    return mx.allclose(one, other, equal_nan=True).item() is True


def _at(paths: list[str]) -> list[str]:
    inner = folded([path for path in paths if path], numbers_are_indices=True)
    return ["the model itself", *inner] if "" in paths else inner
