"""Models with the modules of real ones, whose layers are swapped; most of them cannot be called."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

ready: list[nn.Module] = []  # the modules that factories and `to_quantized` return, made beforehand


class Linear(nn.Linear):
    def __init__(self):
        super().__init__(8, 8, bias=False)

    def to_quantized(self, *_: Any, **__: Any) -> Any:
        return ready.pop()


class Leaf(nn.Module):
    """A layer without arrays."""


class Parts(nn.Module):
    """A module with the given children."""

    def __init__(self, **children: Any):
        super().__init__()
        for name, child in children.items():
            self[name] = child


class Attention(Parts):
    pass


class MLP(Parts):
    pass


class Block(Parts):
    def __call__(self, x: mx.array) -> mx.array:
        return x


def llama(blocks: int = 32) -> Parts:
    """A llama with the usual module names: 453 modules if it has 32 blocks."""

    def linear(*names: str) -> dict[str, nn.Module]:
        return {f"{name}_proj": Linear() for name in names}

    def block() -> Block:
        return Block(
            self_attn=Attention(**linear("q", "k", "v", "o"), rope=nn.RoPE(4)),
            mlp=MLP(**linear("gate", "up", "down"), act=nn.SiLU()),
            input_layernorm=nn.RMSNorm(8),
            post_attention_layernorm=nn.RMSNorm(8),
        )

    layers = [block() for _ in range(blocks)]
    model = Parts(embed_tokens=nn.Embedding(16, 8), layers=layers, norm=nn.RMSNorm(8))
    return Parts(model=model, lm_head=Linear())


def mixture(blocks: int, experts: int) -> Parts:
    """A mixture of experts, with the experts in lists: more modules than real models have."""

    def expert() -> MLP:
        return MLP(gate_proj=Leaf(), up_proj=Leaf(), down_proj=Leaf())

    def block() -> Block:
        return Block(mlp=Parts(experts=[expert() for _ in range(experts)]))

    return Parts(layers=[block() for _ in range(blocks)])


def chain(depth: int) -> Parts:
    """A model whose longest path is `a.a.a...a`, with so many names."""
    model = Parts()
    for _ in range(depth):
        model = Parts(a=model)
    return model
