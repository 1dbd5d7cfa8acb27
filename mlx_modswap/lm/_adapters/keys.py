"""Find the ``keys`` with which mlx-lm puts adapters into the same places again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.nn as nn

from ..._words import described
from .._loaders import VisionLoader, loader_of
from .kinds import LINEAR, kind_of


def find_keys(model: nn.Module, adapters: Mapping[str, nn.Module]) -> tuple[list[str], int]:
    """Return the ``keys`` and ``num_layers`` with which mlx-lm finds the places of the adapters.

    mlx-lm adapts the modules whose path is one of the keys: first the path from each of
    the last ``num_layers`` blocks, and then the path from the model. Keys relative to a
    block are preferred, since other programs can read them too; whole paths can name any
    places. The search of mlx-lm is repeated here: either it finds exactly these places,
    or it is an error.

    Raises:
        ValueError: If mlx-lm would put adapters into other places as well, or if MLX does
            not see some of the adapters.
    """
    if isinstance(loader_of(model), VisionLoader):  # mlx-vlm looks up whole paths
        _check_linear(adapters)
        return list(adapters), -1
    layers: Any = getattr(model, "layers", None)
    layers = layers if isinstance(layers, (list, tuple)) else ()
    _check_hidden(layers)
    blocks = [dict(block.named_modules()) for block in layers if isinstance(block, nn.Module)]
    if len(blocks) == len(layers) and _may_be_relative(model):
        keys, num_layers = _relative_keys(blocks, adapters)
        if keys and keys.isdisjoint(dict(model.named_modules())):
            return sorted(keys), num_layers
    for path in adapters:
        if any(path in names for names in blocks):
            raise ValueError(
                f"mlx-lm would also find {path!r} inside a block, and would put adapters there as "
                "well"
            )
    return list(adapters), len(layers)


def _check_linear(adapters: Mapping[str, Any]) -> None:
    for path, adapter in adapters.items():
        kind = kind_of(adapter)
        if kind is not None and kind.layers != LINEAR:
            layer = type(adapter[kind.holds]).__name__
            raise ValueError(
                f"mlx-vlm puts adapters around linear layers only, not around the {layer} at "
                f"{path!r}; leave it out"
            )


def _may_be_relative(model: nn.Module) -> bool:
    """Return whether keys relative to the last blocks name the same places for their reader."""
    is_of_mlx_lm = any(cls.__module__.split(".")[0] == "mlx_lm" for cls in type(model).__mro__)
    # After `model.pipeline`, the last blocks of this machine are not those of the whole model.
    is_stage = any(getattr(module, "pipeline_size", 1) > 1 for module in model.modules())
    return is_of_mlx_lm and not is_stage


def _relative_keys(
    blocks: list[dict[str, nn.Module]], adapters: Mapping[str, nn.Module]
) -> tuple[set[str], int]:
    """Return the keys, and the number of the last blocks; no keys if they name other places too."""
    wanted = Counter(map(id, adapters.values()))
    has_some = [not wanted.keys().isdisjoint(map(id, names.values())) for names in blocks]
    last = blocks[has_some.index(True) :] if any(has_some) else []
    keys = {key for names in last for key, module in names.items() if id(module) in wanted}
    found = Counter(id(names[key]) for names in last for key in keys if key in names)
    are_distinct = len({id(names[""]) for names in blocks}) == len(blocks)  # each adapted in turn
    return (keys, len(last)) if are_distinct and found == wanted else (set(), 0)


def _check_hidden(layers: Iterable[Any]) -> None:
    """Check that no adapter is in an entry of the blocks that MLX does not see as a module."""
    for index, entry in enumerate(layers):
        if any("lora_a" in module for module in _hidden_modules(entry)):
            raise ValueError(
                f"model.layers[{index}] is {described(entry)}, not an mlx.nn.Module, so MLX does "
                "not see the adapters inside it, and they would be lost; make it a module, such as "
                "an mlx_modswap.Wrapper"
            )


def _hidden_modules(entry: Any) -> list[nn.Module]:
    """Return the modules in a tuple, in the attributes of an object or in what a function uses."""
    if entry is None or isinstance(entry, (nn.Module, list, dict)):
        return []
    cells = getattr(entry, "__closure__", None) or ()
    held = entry if isinstance(entry, tuple) else getattr(entry, "__dict__", {}).values()
    holder = nn.Module()
    for value in (*held, *(cell.cell_contents for cell in cells)):
        dict.__setitem__(holder, str(len(holder)), value)
    return holder.modules()
