"""Find the blocks of a model."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from .._select.select import select


def layers_path(model: nn.Module) -> str:
    """Find the path of the list of blocks that ``model.layers`` returns.

    The models of mlx-lm keep their blocks in different places, but all of them
    have a property ``layers``. The blocks that it returns are looked up in the
    model by identity, so the path is right for any model.

    Args:
        model (mlx.nn.Module): A model with an attribute ``layers``, such as any
            that ``mlx_lm.load`` returns.

    Returns:
        str: The path of the list, to which an index, a slice or the rest of a
        pattern can be added: ``f"{lm.layers_path(model)}[-4:].**.q_proj"``.

    Raises:
        ValueError: If the model has no ``layers``, or if they are neither a list in
            the model nor part of one.

    Example:
        >>> import mlx.nn as nn
        >>> from mlx_modswap import lm
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body = {"blocks": [nn.Linear(4, 4), nn.Linear(4, 4)]}
        ...
        ...     @property
        ...     def layers(self):
        ...         return self.body["blocks"]
        >>> lm.layers_path(Model())
        'body.blocks'
    """
    blocks: Any = getattr(model, "layers", None)
    if blocks is None:
        raise ValueError(f"{type(model).__name__} has no attribute 'layers'")
    if not isinstance(blocks, (list, tuple)) or not blocks:
        found = "an empty list" if isinstance(blocks, (list, tuple)) else type(blocks).__name__
        raise ValueError(f"{type(model).__name__}.layers is {found}, not a list of blocks")
    holders = _lists_of(model, blocks[0])
    for holder in holders:
        inside = set(map(id, select(model, f"{holder}[:]").values()))
        if inside.issuperset(map(id, blocks)):
            return holder
    if holders:
        others = f"only some of its {len(blocks)} blocks are in {' or '.join(map(repr, holders))}"
    else:
        others = f"its first block, a {type(blocks[0]).__name__}, is in no list of the model"
    raise ValueError(f"{type(model).__name__}.layers is not a list in the tree: {others}")


def _lists_of(model: nn.Module, block: nn.Module) -> list[str]:
    """Return the paths of the lists that hold a block."""
    modules = select(model, "**", strict=False)
    paths = [path for path, module in modules.items() if module is block]
    holders = dict.fromkeys(path.rpartition(".")[0] for path in paths)
    return [one for one in holders if one and select(model, f"{one}[:]", strict=False)]
