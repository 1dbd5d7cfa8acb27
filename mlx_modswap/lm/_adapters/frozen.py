"""Check that nothing but adapters was trained."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

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
    arrays: Any = tree_flatten(model.trainable_parameters())
    trainable = [name for name, _ in arrays if name not in own]
    if not trainable:
        return
    if not any(map(_was_frozen, model.modules())):
        raise ValueError(
            f"the model was never frozen: {len(trainable)} arrays outside the adapters are "
            f"trainable, and an adapter folder cannot hold them; {_WAYS_OUT}"
        )
    places = listed(folded(trainable, numbers_are_indices=True))
    raise ValueError(
        f"an adapter folder cannot hold the trainable arrays outside the adapters: {places}; "
        f"{_WAYS_OUT}"
    )


def _was_frozen(module: nn.Module) -> bool:
    """Return whether a module was frozen by someone: quantized layers freeze themselves."""
    return bool(getattr(module, "_no_grad", ())) and "scales" not in module
