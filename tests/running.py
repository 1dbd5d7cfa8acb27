"""A small language model that runs, with layers that nobody calls."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

IDS = mx.array([[1, 2, 3]])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.v_proj = nn.Linear(4, 4)
        self.scale = 2.0

    def __call__(self, x: mx.array, mask: Any = None, *, cache: Any = None) -> mx.array:
        return self.q_proj(x) @ self.v_proj.weight  # v_proj is used by its weights


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.attn.scale * self.mlp(self.attn(x, None, cache=[x]))


class Model(nn.Module):
    """A small language model with a tied embedding, and a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers: list[Any] = [Block(), Block(), Block()]
        self.unused = nn.Linear(4, 4)
        self.head = self.embed

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head.as_linear(x)


def nothing(path: str, output: Any, *args: Any, **kwargs: Any) -> None:
    """A hook that does nothing."""
