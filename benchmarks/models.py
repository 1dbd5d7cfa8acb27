"""Models with the modules of real ones, but with small arrays, whose layers are swapped."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

ready: list[nn.Module] = []  # the modules that factories and `to_quantized` return, made beforehand


class Leaf(nn.Module):
    """A layer without arrays."""

    def to_quantized(self, **_: Any) -> nn.Module:
        return ready.pop()


class ArrayLeaf(Leaf):
    """A layer with an array."""

    def __init__(self):
        super().__init__()
        self.weight = mx.zeros((1,))


class Linear(nn.Linear):
    def __init__(self, input_dims: int = 8, output_dims: int = 8, bias: bool = False):
        super().__init__(input_dims, output_dims, bias)

    def to_quantized(self, *_: Any, **__: Any) -> Any:
        return ready.pop()


class LoRALinear(nn.Module):
    """A linear layer with a low-rank adapter."""

    def __init__(self, linear: Any, rank: int = 8):
        super().__init__()
        output_dims, input_dims = linear.weight.shape
        dtype = linear.weight.dtype
        self.linear = linear
        self.a = mx.random.normal((input_dims, rank)).astype(dtype) * input_dims**-0.5
        self.b = mx.zeros((rank, output_dims), dtype)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + (x @ self.a) @ self.b


# ---------------------------------------------------------------- llama

Make = Callable[[int, int], nn.Module]  # input and output dimensions -> a linear layer


class Attention(nn.Module):
    def __init__(self, dims: int, heads: int, linear: Make):
        super().__init__()
        self.heads = heads
        self.q_proj = linear(dims, dims)
        self.k_proj = linear(dims, dims)
        self.v_proj = linear(dims, dims)
        self.o_proj = linear(dims, dims)
        self.rope = nn.RoPE(dims // heads)

    def __call__(self, x: mx.array) -> mx.array:
        batch, length, dims = x.shape
        q, k, v = (
            proj(x).reshape(batch, length, self.heads, -1).transpose(0, 2, 1, 3)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        scale = (dims // self.heads) ** -0.5
        mixed = mx.fast.scaled_dot_product_attention(
            self.rope(q), self.rope(k), v, scale=scale, mask="causal"
        )
        return self.o_proj(mixed.transpose(0, 2, 1, 3).reshape(batch, length, dims))


class MLP(nn.Module):
    def __init__(self, dims: int, hidden: int, linear: Make):
        super().__init__()
        self.gate_proj = linear(dims, hidden)
        self.up_proj = linear(dims, hidden)
        self.down_proj = linear(hidden, dims)
        self.act = nn.SiLU()

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, dims: int, hidden: int, heads: int, linear: Make):
        super().__init__()
        self.self_attn = Attention(dims, heads, linear)
        self.mlp = MLP(dims, hidden, linear)
        self.input_layernorm = nn.RMSNorm(dims)
        self.post_attention_layernorm = nn.RMSNorm(dims)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    def __init__(self, layers: int, dims: int, hidden: int, heads: int, words: int, linear: Make):
        super().__init__()
        self.embed_tokens = nn.Embedding(words, dims)
        self.layers = [Block(dims, hidden, heads, linear) for _ in range(layers)]
        self.norm = nn.RMSNorm(dims)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Llama(nn.Module):
    """A llama with the usual module names: 453 modules if it has 32 layers."""

    def __init__(
        self,
        layers: int = 32,
        dims: int = 8,
        hidden: int = 8,
        heads: int = 2,
        words: int = 16,
        linear: Make = Linear,
    ):
        super().__init__()
        self.model = LlamaModel(layers, dims, hidden, heads, words, linear)
        self.lm_head = linear(dims, words)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.lm_head(self.model(tokens))


# ---------------------------------------------------------------- other shapes


class Expert(nn.Module):
    def __init__(self, leaf: Callable[[], nn.Module]):
        super().__init__()
        self.gate_proj = leaf()
        self.up_proj = leaf()
        self.down_proj = leaf()


class Experts(nn.Module):
    def __init__(self, experts: int, leaf: Callable[[], nn.Module]):
        super().__init__()
        self.experts = [Expert(leaf) for _ in range(experts)]


class MixtureBlock(nn.Module):
    def __init__(self, experts: int, leaf: Callable[[], nn.Module]):
        super().__init__()
        self.mlp = Experts(experts, leaf)


class Mixture(nn.Module):
    """A mixture of experts, with the experts in lists: 61,561 modules, an extreme number."""

    def __init__(self, layers: int = 60, experts: int = 256, leaf: Callable[[], nn.Module] = Leaf):
        super().__init__()
        self.layers = [MixtureBlock(experts, leaf) for _ in range(layers)]


class Chain(nn.Module):
    """Deeply nested modules, with a leaf at each level."""

    def __init__(self, inner: Chain | None):
        super().__init__()
        self.leaf = Leaf()
        if inner is not None:
            self.inner = inner


def chain(levels: int = 500) -> nn.Module:
    sys.setrecursionlimit(10_000)  # `tree_unflatten`, and so the idiom, fails otherwise
    model = None
    for _ in range(levels):
        model = Chain(model)
    assert model is not None
    return model


class LongList(nn.Module):
    def __init__(self, length: int = 100_000):
        super().__init__()
        self.layers = [Leaf() for _ in range(length)]


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = Linear()
