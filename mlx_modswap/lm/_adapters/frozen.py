"""Check that nothing but adapters was trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..._patterns.fold import folded
from ..._words import listed

_WAYS_OUT = (
    "if nothing else was trained, pass trained='drop'; if it was, fuse the adapters and save the "
    "whole model with lm.save; next time, call model.freeze() before the adapters are put in"
)


def check_frozen(model: nn.Module, adapters: Collection[str]) -> None:
    """Raise a ``ValueError`` if arrays outside the adapters, which are at these paths, can train.

    What is trainable need not have been trained, but nothing tells the two apart.
    """
    own = {f"{path}.{name}" for path in adapters for name in ("lora_a", "lora_b", "m")}
    modules = model.named_modules()[::-1]  # in the order of the model
    trainable = [
        name for path, module in modules for name in _trainable(path, module) if name not in own
    ]
    if not trainable:
        return
    if not any(_was_frozen(module) for _, module in modules):
        raise ValueError(
            f"the model was never frozen: {len(trainable)} arrays outside the adapters are "
            f"trainable, and an adapter folder cannot hold them; {_WAYS_OUT}"
        )
    places = listed(folded(trainable, numbers_are_indices=True))
    raise ValueError(
        f"an adapter folder cannot hold the trainable arrays outside the adapters: {places}; "
        f"{_WAYS_OUT}"
    )


def _trainable(path: str, module: nn.Module) -> Iterator[str]:
    """Yield the names of a module's own trainable arrays.

    ``model.trainable_parameters()`` fails for a few models, in which a class does not call
    ``super().__init__()``.
    """
    for key, value in module.items():
        if not key.startswith("_") and key not in _frozen_keys(module):
            arrays: Any = tree_flatten(value, is_leaf=lambda one: isinstance(one, nn.Module))
            for name, array in arrays:
                if isinstance(array, mx.array):
                    yield ".".join(filter(None, (path, key, name)))


def _frozen_keys(module: nn.Module) -> Collection[str]:
    return getattr(module, "_no_grad", ())


def _was_frozen(module: nn.Module) -> bool:
    """Return whether a module was frozen by someone: quantized layers freeze themselves."""
    return bool(_frozen_keys(module)) and "scales" not in module
