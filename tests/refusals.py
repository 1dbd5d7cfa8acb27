"""The text of the error that a swap ends with, having changed nothing."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
import pytest
from oracle import Snapshot

from mlx_modswap import NoMatchError, SelectionError, replace_layers, swapped


def refuses(model: nn.Module, *arguments: Any, **options: Any) -> str:
    return _refusal(SelectionError, model, arguments, options)


def misses(model: nn.Module, *arguments: Any, **options: Any) -> str:
    return _refusal(NoMatchError, model, arguments, options)


def _refusal(error: Any, model: nn.Module, arguments: Any, options: dict[str, Any]) -> str:
    before = Snapshot(model)
    texts: list[str] = []
    swaps: list[Any] = [replace_layers, swapped]
    for swap in swaps:
        with pytest.raises(error) as caught:
            swap(model, *arguments, **options).__enter__()
        texts.append(str(caught.value))
        assert before.differences() == []
    assert texts[0] == texts[1]
    return texts[0]


def modified(path: str) -> str:
    """The message of a block that ends after its place at ``path`` was modified by hand."""
    left = "was modified inside the block and left as it is now; everything else was put back"
    return f"{path!r} {left}"
