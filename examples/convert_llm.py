"""Quantize a language model by rules into a folder that mlx-lm loads, and measure the loss.

::

    python examples/convert_llm.py                     # SmolLM2-135M-Instruct, see smollm2.py
    python examples/convert_llm.py --model mlx-community/Qwen3-0.6B-bf16 --folder qwen-mixed

The conversion never holds the whole model in memory: each file is written as soon as its layers are
quantized. The result is an ordinary folder, which does not need this library.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import smollm2
from mlx.utils import tree_flatten

from mlx_modswap import NoMatchError, tree

try:
    import mlx_lm
    from mlx_lm.utils import compute_bits_per_weight

    from mlx_modswap import lm
except ImportError:
    sys.exit("mlx-lm is not installed: pip install 'mlx-modswap[lm]'")

# The first rule that matches a layer decides; None leaves it alone, with everything inside it.
RULES = {
    "**.embed_tokens": 8,
    "**.layers[0]": None,
    "**.{v,down}_proj": 6,
    "**": 4,
}
QUESTION = "What is the capital of France? Answer in one sentence."
TEXT = """\
The lighthouse at the end of the pier was built a hundred and fifty years ago, after three ships
had been lost in one winter. Its keeper climbed the stairs every evening to light the lamp, and
wrote down the weather in a book that is kept in the town's museum. Today the lamp is switched on
by a computer, but on the first Sunday of each month the door is open, and children may count
the steps for themselves.
"""


class Study(NamedTuple):
    """What is measured before the conversion and after it."""

    answer: str
    log_probs: mx.array  # of each next token of the text, tokens x vocabulary
    megabytes: float
    bits: float


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Quantize a language model by rules.")
    parser.add_argument(
        "--model", help="a folder, or the id of a model on the hub (default: smollm2, made if new)"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("smollm2-mixed"),
        help="where the result goes; must not exist yet (default: smollm2-mixed)",
    )
    args = parser.parse_args(argv)
    if args.folder.exists():
        sys.exit(f"{args.folder} exists: remove it, or give another --folder")
    source = args.model or str(smollm2.make("smollm2"))

    before = study(source, draw=True)
    peak = convert(source, args.folder)
    after = study(str(args.folder))

    lost = divergence(before.log_probs, after.log_probs)
    print(f"""
answer before      {before.answer}
answer after       {after.answer}
size               {before.megabytes:.1f} MB -> {after.megabytes:.1f} MB
bits per weight    {before.bits:.2f} -> {after.bits:.2f}
peak memory        {peak:.1f} MB, of the conversion
KL divergence      {lost.mean().item():.4f} nats per token, mean of {lost.size} tokens

The original is in {source}, the result in {args.folder}. Try it:
mlx_lm.generate --model {args.folder} --prompt "Who are you?\"""")


def study(folder: str, draw: bool = False) -> Study:
    model, tokenizer = load(folder)
    if draw:
        print(tree(model), end="\n\n")
    arrays: Any = tree_flatten(model.parameters())
    return Study(
        ask(model, tokenizer),
        read(model, tokenizer),
        sum(array.nbytes for _, array in arrays) / 1e6,
        compute_bits_per_weight(model),
    )


def load(folder: str) -> tuple[Any, Any]:
    """Load a model and its tokenizer with mlx-lm; on failure, exit with a message of one line."""
    try:
        model, tokenizer, *_ = mlx_lm.load(folder)
    except Exception as error:  # a folder may be wrong in many ways
        reason = str(error).partition("\n")[0]
        sys.exit(f"{folder} cannot be loaded ({type(error).__name__}: {reason})")
    return model, tokenizer


def ask(model: Any, tokenizer: Any) -> str:
    prompt = QUESTION
    if tokenizer.chat_template is not None:
        message = {"role": "user", "content": QUESTION}
        prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True)
    return mlx_lm.generate(model, tokenizer, prompt, max_tokens=24).strip()


def read(model: Any, tokenizer: Any) -> mx.array:
    """Return the log-probabilities of the next token, at each token of the text."""
    logits = model(mx.array(tokenizer.encode(TEXT))[None])[0].astype(mx.float32)
    log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(log_probs)  # now, since its graph would keep the weights alive
    return log_probs


def convert(source: str, folder: Path) -> float:
    """Convert the model, and return the peak of the memory that this took, in MB."""
    # Without Metal or CUDA, quantized layers are thirty times slower with float16 scales.
    dtype = "float32" if mx.default_device() == mx.cpu else None
    mx.clear_cache()
    in_use = mx.get_active_memory()
    mx.reset_peak_memory()
    try:
        print(lm.convert(source, folder, RULES, dtype=dtype))
    except (NoMatchError, ValueError, OSError) as error:
        sys.exit(f"{source} cannot be converted: {error}")
    return (mx.get_peak_memory() - in_use) / 1e6


def divergence(p: mx.array, q: mx.array) -> mx.array:
    """Return the Kullback-Leibler divergence of the two distributions at each token, in nats."""
    return (mx.exp(p) * (p - q)).sum(axis=-1)


if __name__ == "__main__":
    main()
