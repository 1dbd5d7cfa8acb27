"""Shard the layers of a llama-like model over several processes, by rules.

In two processes on one machine, or in a single process, where nothing is sharded::

    mlx.launch -n 2 python examples/tensor_parallel.py
    python examples/tensor_parallel.py

On several machines, which a file lists::

    mlx.launch --hostfile hosts.json python examples/tensor_parallel.py
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_linear
from mlx.utils import tree_flatten

from mlx_modswap import Replacement, replace_layers, select

WIDTH, HEADS, KV_HEADS, HEAD_WIDTH, HIDDEN, BLOCKS, WORDS = 256, 8, 4, 32, 768, 4, 500


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.kv_heads = HEADS, KV_HEADS
        self.q_proj = nn.Linear(WIDTH, HEADS * HEAD_WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, KV_HEADS * HEAD_WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, KV_HEADS * HEAD_WIDTH, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_WIDTH, WIDTH, bias=False)
        self.rope = nn.RoPE(HEAD_WIDTH)

    def __call__(self, x: mx.array) -> mx.array:
        q = self.rope(split(self.q_proj(x), self.heads))
        k = self.rope(split(self.k_proj(x), self.kv_heads))
        v = split(self.v_proj(x), self.kv_heads)
        mask = nn.MultiHeadAttention.create_additive_causal_mask(x.shape[1], x.dtype)
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=HEAD_WIDTH**-0.5, mask=mask)
        return self.o_proj(x.swapaxes(1, 2).flatten(2))


def split(x: mx.array, heads: int) -> mx.array:
    return mx.unflatten(x, -1, (heads, -1)).swapaxes(1, 2)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.attn_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


def build() -> nn.Module:
    blocks = [Block() for _ in range(BLOCKS)]
    head = nn.Linear(WIDTH, WORDS, bias=False)
    return nn.Sequential(nn.Embedding(WORDS, WIDTH), *blocks, nn.RMSNorm(WIDTH), head)


def shard(model: nn.Module, group: mx.distributed.Group) -> Replacement:
    """Shard every block, so that each process keeps its part, and return what was replaced."""

    def outputs(path: str, layer: nn.Module) -> nn.Module:  # each computes some heads or units
        return shard_linear(layer, "all-to-sharded", group=group)

    def inputs(path: str, layer: nn.Module) -> nn.Module:  # each takes its part; the results add up
        return shard_linear(layer, "sharded-to-all", group=group)

    rules = {"layers.*.*.{q,k,v,gate,up}_proj": outputs, "layers.*.*.{o,down}_proj": inputs}
    replaced = replace_layers(model, rules)
    # The number of heads is not a module: it is set, not swapped, after the swap has worked.
    attentions: dict[str, Any] = select(model, "**.self_attn")
    for attention in attentions.values():
        attention.heads //= group.size()
        attention.kv_heads //= group.size()
    return replaced


def main() -> None:
    group = mx.distributed.init()
    size = group.size()
    if HEADS % size or KV_HEADS % size:
        raise SystemExit(f"{HEADS} and {KV_HEADS} heads cannot be shared by {size} processes")

    mx.random.seed(0)  # each process starts with the same model and the same text
    model, text = build(), mx.random.randint(0, WORDS, (1, 32))
    whole, weights = model(text), megabytes(model)
    mx.eval(whole)  # now, since its graph would keep the whole layers alive
    replaced = shard(model, group)
    shared = model(text)
    mx.eval(shared)  # in all processes, which exchange their results

    if group.rank() == 0:
        print(replaced)
        print()
        print(f"processes           {size}{'' if size > 1 else ', see mlx.launch for more'}")
        print(f"weights in each     {weights:.1f} MB -> {megabytes(model):.1f} MB")
        print(f"largest logit       {mx.abs(whole).max().item():.2f}")
        print(f"largest difference  {mx.abs(whole - shared).max().item():.1e}")


def megabytes(model: nn.Module) -> float:
    arrays = dict(tree_flatten(model.parameters())).values()
    return sum(array.nbytes for array in arrays) / 1e6


if __name__ == "__main__":
    main()
