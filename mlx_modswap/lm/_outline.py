"""What a model is made of, without its numbers, and how another one differs from it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .._select import select
from ._paths import folded, listed

_PLAIN = (bool, int, float, complex, str, bytes, type(None), mx.Dtype, Enum)
# Entries of a config that some models keep; what they say is seen in the layers.
_ABOUT_LAYERS = frozenset({"quantization", "quantization_config"})


class Outline(NamedTuple):
    """What a model is made of.

    Attributes:
        classes (dict): The class of the module at each path; ``""`` is the model.
        attributes (dict): What the module at each path has besides modules and
            parameters, in words, by name.
        arrays (dict): Shape and dtype of each parameter, in words, by name.
    """

    classes: dict[str, type]
    attributes: dict[str, dict[str, str]]
    arrays: dict[str, str]


def outline(model: nn.Module, without: Iterable[str] = ()) -> Outline:
    """Describe a model; nothing is computed.

    Args:
        model (mlx.nn.Module): The model.
        without (Iterable[str]): The names of attributes to leave out, also inside of
            the arguments that the model keeps.
    """
    left_out = _ABOUT_LAYERS.union(without)
    modules = {"": model, **select(model, "**", strict=False)}
    parameters: Any = tree_flatten(model.parameters())
    return Outline(
        {path: type(module) for path, module in modules.items()},
        {path: _attributes(module, left_out) for path, module in modules.items()},
        {name: _told(array, left_out) for name, array in parameters},
    )


def _attributes(module: nn.Module, left_out: frozenset[str]) -> dict[str, str]:
    # MLX keeps arrays, modules, lists and dicts in the module, which is a dict, and all else in
    # its `__dict__`. What is private there is MLX's own, or is made anew when it is needed.
    held = {**vars(module), **module}
    return {
        name: _told(value, left_out)
        for name, value in held.items()
        if not name.startswith("_")
        and name not in left_out
        and not isinstance(value, (mx.array, nn.Module))
    }


def _told(value: Any, left_out: frozenset[str]) -> str:
    """A value in words that are the same in two models if the value is the same."""
    told = partial(_told, left_out=left_out)
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, mx.array):
        return f"{str(value.dtype).removeprefix('mlx.core.')} {value.shape}"
    if isinstance(value, nn.Module):  # it has a path of its own
        return "a module"
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if field.name not in left_out]
        return (
            f"{type(value).__name__}({', '.join(f'{n}={told(getattr(value, n))}' for n in names)})"
        )
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {told(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(told, value))})"
    if isinstance(value, (type, FunctionType, BuiltinFunctionType, MethodType)):
        return value.__qualname__
    return type(value).__name__


# ---------------------------------------------------------------- differences


def difference(built: Outline, model: Outline) -> str:
    """How what mlx-lm builds differs from a model, and what to do; ``""`` if it does not."""
    return (
        _other_classes(built.classes, model.classes)
        or _other_attributes(built.attributes, model.attributes)
        or _other_arrays(built.arrays, model.arrays)
    )


def _other_classes(built: dict[str, type], model: dict[str, type]) -> str:
    differing: dict[tuple[type | None, type | None], list[str]] = {}
    seen: set[str] = set()
    for path in [*model, *(path for path in built if path not in model)]:
        one, other = built.get(path), model.get(path)
        if _is_same(one, other):
            continue
        seen.add(path)
        if not any(path.startswith(f"{above}.") for above in seen):  # it says enough
            differing.setdefault((one, other), []).append(path)
    if not differing:
        return ""
    texts = [
        f"mlx-lm builds {_name(one, other)} at {listed(_at(paths))}, the model has "
        f"{_name(other, one)}"
        for (one, other), paths in differing.items()
    ]
    if all(None in classes for classes in differing):
        cure = "give the entries of its config that have changed with config={...}"
    else:
        cure = "fuse or unwrap it, or give a model_file"
    return f"{listed(texts, ', and ')}: {cure}"


def _is_same(one: type | None, other: type | None) -> bool:
    """Whether two classes are one, or would be if the file of one had not been run twice.

    mlx-lm runs a ``model_file`` anew for each model, and what it defines is found in no
    module that is imported. Such a class is known by its name.
    """
    if one is other:
        return True
    if one is None or other is None or one.__qualname__ != other.__qualname__:
        return False
    return getattr(sys.modules.get(one.__module__), one.__name__, None) is not one


def _name(cls: type | None, other: type | None) -> str:
    if cls is None:
        return "nothing"
    if other is not None and cls.__name__ == other.__name__:
        return f"{cls.__module__}.{cls.__qualname__}"
    return cls.__name__


def _other_attributes(built: dict[str, dict[str, str]], model: dict[str, dict[str, str]]) -> str:
    differing: dict[tuple[str, str, str], list[str]] = {}
    for path, attributes in model.items():
        for name in dict.fromkeys([*attributes, *built[path]]):
            one, other = built[path].get(name, "nothing"), attributes.get(name, "nothing")
            if one != other:
                differing.setdefault((name, *_shortened(one, other)), []).append(path)
    texts = [
        f"mlx-lm sets {name} of {listed(_at(paths))} to {one}, the model has {other}"
        for (name, one, other), paths in differing.items()
    ]
    cure = "set it in the model, or give the entry of the config that sets it with config={...}"
    return f"{listed(texts, ', and ')}: {cure}" if texts else ""


def _shortened(one: str, other: str, most: int = 60) -> tuple[str, str]:
    """Two long texts from where they differ on."""
    if max(len(one), len(other)) <= most:
        return one, other
    same = next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), 0)
    start = max(one.rfind(" ", 0, same) + 1, 0)
    return f"...{one[start : start + most]}...", f"...{other[start : start + most]}..."


def _other_arrays(built: dict[str, str], model: dict[str, str]) -> str:
    differing: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys([*model, *built]):
        one, other = built.get(name, "nothing"), model.get(name, "nothing")
        if one != other:
            differing.setdefault((one, other), []).append(name)
    texts = [
        f"mlx-lm makes {one} of {listed(_at(names))}, the model has {other}"
        for (one, other), names in differing.items()
    ]
    return listed(texts, ", and ")


def _at(paths: list[str]) -> list[str]:
    return [text or "the model itself" for text in folded(paths)]
