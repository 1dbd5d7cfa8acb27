"""Teach all-MiniLM-L6-v2 to tell praise from complaint with LoRA, and save only the adapters.

As it comes, the model puts a sentence next to those on the same subject, whatever they say of it.
A few adapters in its last two blocks, trained for some steps on eight sentences, change that::

    python examples/finetune_lora.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import minilm
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlx_modswap import Replacement, replace_layers

STEPS = 8
RATE = 4e-3
PRAISE = ["The soup was delicious.", "A moving film.", "The driver was nice.", "I love my coat."]
BLAME = ["The soup was cold.", "A dull film.", "The driver was rude.", "I hate my coat."]
NEW_PRAISE = ["The room was clean.", "Our guide was funny.", "This game is fun.", "Good coffee!"]
NEW_BLAME = ["The room was dirty.", "Our guide was bored.", "This game is boring.", "Bad coffee!"]


class LoRA(nn.Module):
    """A layer with a low-rank correction that is nothing at first."""

    def __init__(self, layer: Any, rank: int = 4, scale: float = 2.0):
        super().__init__()
        outputs, inputs = layer.weight.shape
        self.layer = layer
        self.scale = scale
        self.a = mx.random.normal((inputs, rank), scale=inputs**-0.5).astype(layer.weight.dtype)
        self.b = mx.zeros((rank, outputs), dtype=layer.weight.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        return self.layer(x) + self.scale * (x @ self.a) @ self.b


def add_adapters(model: nn.Module) -> Replacement:
    model.freeze()  # before the swap: what is new stays trainable
    pattern = "encoder.layer[-2:].attention.self.{query,value}"
    return replace_layers(model, pattern, lambda path, layer: LoRA(layer), where=nn.Linear)


def main() -> None:
    mx.random.seed(0)
    model, tokenizer = minilm.load()
    new = NEW_PRAISE + NEW_BLAME
    before = alike(minilm.embed(model, tokenizer, new))

    print(add_adapters(model))
    print()
    train(model, tokenizer)

    tuned = minilm.embed(model, tokenizer, new)
    print()
    print(f"new sentences next to one of their kind  {before} -> {alike(tuned)} of {len(new)}")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "adapters.safetensors")
        adapters = dict(tree_flatten(model.trainable_parameters()))
        mx.save_safetensors(str(file), adapters)
        kilobytes = file.stat().st_size / 1e3

        fresh, _ = minilm.load()
        add_adapters(fresh)  # the same swap, so the names in the file fit
        fresh.load_weights(str(file), strict=False)  # the file holds nothing but adapters
        again = minilm.embed(fresh, tokenizer, new)
    equal = "equal" if mx.array_equal(tuned, again) else "different"
    print(f"adapters saved                           {len(adapters)} arrays, {kilobytes:.1f} KB")
    print(f"embeddings of a fresh model with them    {equal}")


def train(model: nn.Module, tokenizer) -> None:
    praised = mx.array([True] * len(PRAISE) + [False] * len(BLAME))

    def loss_of(model: minilm.Bert) -> mx.array:
        return contrastive_loss(minilm.embed(model, tokenizer, PRAISE + BLAME), praised)

    optimizer = optim.Adam(learning_rate=RATE)
    optimizer.init(model.trainable_parameters())  # after the swap: its state is by layer
    step = nn.value_and_grad(model, loss_of)  # a step of `mx.compile` too is made after the swap
    for number in range(1, STEPS + 1):
        loss, gradients = step(model)
        optimizer.update(model, gradients)
        mx.eval(model.trainable_parameters(), optimizer.state)
        print(f"step {number}   loss {loss.item():.3f}")


def contrastive_loss(vectors: mx.array, kind: mx.array) -> mx.array:
    """Low when the sentences that are most similar are of one kind."""
    itself = mx.eye(len(vectors))
    similarity = vectors @ vectors.T / 0.1 - 1e9 * itself
    odds = similarity - mx.logsumexp(similarity, axis=-1, keepdims=True)
    partners = (kind[:, None] == kind).astype(odds.dtype) - itself
    return -((partners * odds).sum(axis=-1) / partners.sum(axis=-1)).mean()


def alike(vectors: mx.array) -> int:
    """How many are nearest to one of their own half."""
    nearest = mx.argmax(vectors @ vectors.T - 2 * mx.eye(len(vectors)), axis=-1)
    half = len(vectors) // 2
    return int(((nearest < half) == (mx.arange(len(vectors)) < half)).sum())


if __name__ == "__main__":
    main()
