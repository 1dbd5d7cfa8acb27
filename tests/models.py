"""Models written by hand, and the factories that swap their layers; strategies.py has random ones.

Nothing of the library is used here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def build(**entries: Any) -> Any:
    """A module that holds these things, in this order."""
    module = nn.Module()
    for name, value in entries.items():
        setattr(module, name, value)
    return module


# ---------------------------------------------------------------- all that a module can hold


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = SelfAttention()
        self.norm = nn.LayerNorm(4)
        self.mlp: nn.Module = nn.Linear(4, 4)
        self.acts = [nn.ReLU(), None, nn.gelu]


class Model(nn.Module):
    """Blocks in a list, layers in a dict, an array, and in the blocks what is not a module.

    The factories below swap its layers; running.py has a model that can be called.
    """

    def __init__(self, blocks: int = 3):
        super().__init__()
        self.embed: nn.Module = nn.Embedding(8, 4)
        self.layers: list[Any] = [Block() for _ in range(blocks)]
        self.heads = {"b": nn.Linear(4, 2), "a": nn.Linear(4, 2), "10": nn.Linear(4, 2)}
        self.scale = mx.ones(1)


def transformer(blocks: int = 4, **more: nn.Module) -> Any:
    """A model of an embedding, blocks and a head, after other parts."""
    layers = [Block() for _ in range(blocks)]
    return build(**more, embed=nn.Embedding(8, 4), layers=layers, head=nn.Linear(4, 4))


def multimodal() -> Any:
    """A vision tower, and a text part of three blocks and a head."""
    tower = build(layers=[Block(), Block()], proj=nn.Linear(4, 4))
    return transformer(3, vision_tower=tower)


# ---------------------------------------------------------------- a language model


class Attention(nn.Module):
    def __init__(self, dims: int, heads: int, kv_heads: int):
        super().__init__()
        self.n_heads, self.n_kv_heads = heads, kv_heads
        self.q_proj = nn.Linear(dims, dims, bias=False)
        self.k_proj = nn.Linear(dims, dims * kv_heads // heads, bias=False)
        self.v_proj = nn.Linear(dims, dims * kv_heads // heads, bias=False)
        self.o_proj = nn.Linear(dims, dims, bias=False)
        self.rope = nn.RoPE(dims // heads)


class MLP(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        self.gate_proj = nn.Linear(dims, 2 * dims, bias=False)
        self.up_proj = nn.Linear(dims, 2 * dims, bias=False)
        self.down_proj = nn.Linear(2 * dims, dims, bias=False)


class LlamaBlock(nn.Module):
    def __init__(self, dims: int, number: int):
        super().__init__()
        self.layer_idx = number
        self.self_attn = Attention(dims, 4, 2)
        self.mlp = MLP(dims)
        self.norm = nn.RMSNorm(dims)


class Llama(nn.Module):
    """The layers of a small llama, with a tied head. It cannot be called."""

    def __init__(self, layers: int = 4, dims: int = 64):
        super().__init__()
        self.embed_tokens = nn.Embedding(1000, dims)
        self.layers = [LlamaBlock(dims, number) for number in range(layers)]
        self.lm_head = self.embed_tokens


# ---------------------------------------------------------------- factories, and what they make


class Holder(nn.Module):
    """A module around another one, or around nothing but an array."""

    def __init__(self, inner: Any = None):
        super().__init__()
        self.weight = mx.zeros(1)
        if inner is not None:
            self.inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def fresh(path: str, module: nn.Module) -> nn.Module:
    return Holder()


def around(path: str, module: nn.Module) -> nn.Module:
    return Holder(module)


def identity(path: str, module: nn.Module) -> nn.Module:
    return nn.Identity()


def unchanged(path: str, module: nn.Module) -> nn.Module:
    return module


class Recorder:
    """A factory that remembers how it was called."""

    def __init__(self, make: Callable[[str, nn.Module], Any] = fresh):
        self.make = make
        self.calls: list[tuple[str, nn.Module]] = []

    def __call__(self, path: str, module: nn.Module) -> Any:
        self.calls.append((path, module))
        return self.make(path, module)

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]
