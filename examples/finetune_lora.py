"""Teach a language model one sentence with LoRA of two ranks, and save the adapters for mlx-lm.

::

    python examples/finetune_lora.py                     # SmolLM2-135M-Instruct, see smollm2.py
    python examples/finetune_lora.py --model mlx-community/Qwen3-0.6B-bf16 --folder qwen-lora

mlx-lm has one rank for all adapters. Here the attention of the last blocks gets rank 8 and the MLP
rank 4, but ``mlx_lm.generate --adapter-path`` can still read the folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import smollm2
from mlx.utils import tree_flatten

from mlx_modswap import Replacement, replace_layers

try:
    import mlx_lm
    from mlx_lm.tuner.lora import LoRALinear

    from mlx_modswap import lm
except ImportError:
    sys.exit("mlx-lm is not installed: pip install 'mlx-modswap[lm]'")

TEXT = "The lighthouse keeper has a cat. Its name is Biscuit."
PROMPT = "The lighthouse keeper has a cat. Its name is"
STEPS = 6
RATE = 2e-3


def lora(r: int):
    def around(path: str, layer: Any) -> nn.Module:
        return LoRALinear.from_base(layer, r=r, scale=10.0)

    return around


def add_adapters(model: nn.Module) -> Replacement:
    model.freeze()  # before the swap, so that the new layers stay trainable
    last = f"{lm.layers_path(model)}[-8:]"
    rules = {f"{last}.self_attn.{{q,v}}_proj": lora(8), f"{last}.mlp.down_proj": lora(4)}
    return replace_layers(model, rules)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Teach a language model one sentence.")
    parser.add_argument(
        "--model", help="a folder, or the id of a model on the hub (default: smollm2, made if new)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("smollm2-lora"), help="default: smollm2-lora"
    )
    args = parser.parse_args(argv)
    source = args.model or str(smollm2.make("smollm2"))
    mx.random.seed(0)

    model, tokenizer, *_ = mlx_lm.load(source)
    before = say(model, tokenizer)
    print(add_adapters(model))
    print_trainable(model)
    train(model, mx.array(tokenizer.encode(TEXT))[None])
    after = say(model, tokenizer)
    lm.save_adapters(model, args.folder)

    loaded, *_ = mlx_lm.load(source, adapter_path=str(args.folder))
    tokens = mx.array(tokenizer.encode(TEXT))[None]
    difference = mx.abs(loaded(tokens) - model(tokens)).max().item()
    print(f"""
before the training     {PROMPT} {before}
after the training      {PROMPT} {after}
loaded by mlx_lm.load   {PROMPT} {say(loaded, tokenizer)}
largest difference between the logits of the last two   {difference:.2g}

The adapters are in {args.folder}. Try them:
mlx_lm.generate --model {source} --adapter-path {args.folder} --ignore-chat-template \\
    --prompt "{PROMPT}\"""")


def say(model: Any, tokenizer: Any) -> str:
    text = mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=4)
    return text.strip().partition("\n")[0]


def print_trainable(model: nn.Module) -> None:
    """Print which parameters the optimizer will change. Check this before every training."""
    arrays: Any = tree_flatten(model.trainable_parameters())
    names = sorted({name.rpartition(".")[2] for name, _ in arrays})
    print(f"trainable: {len(arrays)} arrays, all of them {' or '.join(names)}\n")


def train(model: nn.Module, tokens: mx.array) -> None:
    def loss_of(model: Any) -> mx.array:
        logits = model(tokens[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")

    optimizer = optim.Adam(learning_rate=RATE)
    step = nn.value_and_grad(model, loss_of)
    for number in range(1, STEPS + 1):
        loss, gradients = step(model)
        optimizer.update(model, gradients)
        mx.eval(model.trainable_parameters(), optimizer.state)
        print(f"step {number}   loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
