"""Quantize a language model, and train it to predict again what the original predicts.

::

    python examples/distill_quantized.py                               # SmolLM2, see smollm2.py
    python examples/distill_quantized.py --model smollm2 --quantized smollm2-mixed --folder NEW
    mlx_lm.generate --model smollm2-distilled --prompt "Who are you?"

A quantized weight is ``level * scale + bias``: a level is one of ``2 ** bits`` whole numbers, and
the weights of a group share a scale and a bias. Quantization rounds each weight to the nearest
level. That is best for the weight but not for the model, in which the errors of many weights add
up; other levels let them cancel. So all three are trained:

1. ``replace_layers`` puts a ``Rounded`` module in the place of each quantized layer. Its levels are
   fractions. They are rounded in the forward pass, and the gradient ignores the rounding (a
   straight-through estimator).
2. Training minimizes the Kullback-Leibler divergence (KL) of the next-token distributions from
   those of the original, on a text and on continuations of it that the original writes. Such text
   is unlimited, so there is little to overfit to.
3. ``replace_layers`` puts quantized layers back, with the new levels, scales and biases. Their size
   is the same as before, and mlx-lm loads the folder that ``lm.save`` writes.

Without a GPU, only the last block is trained, for a few steps.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import smollm2

from mlx_modswap import replace_layers, select, swapped

try:
    import mlx_lm
    from mlx_lm.models.cache import make_prompt_cache
    from tqdm import tqdm

    from mlx_modswap import lm
except ImportError:
    sys.exit("mlx-lm is not installed: pip install 'mlx-modswap[lm]'")

START = 8  # tokens of the text that the original continues
SLOWER = 0.1  # how fast scales and biases change, compared with levels
NEAR = (
    0.45  # how far from the quantized level a weight may start: less than half, so it rounds back
)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    mx.random.seed(0)
    source = args.model or str(smollm2.make("smollm2"))
    teacher, tokenizer, *_ = mlx_lm.load(source)
    student, *_ = mlx_lm.load(args.quantized or source)
    if mx.default_device() == mx.cpu:
        teacher.set_dtype(mx.float32)  # the fastest dtype on a CPU
        student.set_dtype(mx.float32)
    if not args.quantized:
        print(lm.quantize(student, {"**": args.bits}))

    text = read(tokenizer, args.text, args.tokens, args.length)
    held_out, text = text[-args.batch :], text[: -args.batch]
    sequences = mx.concatenate([text, write(teacher, text, args.written)])
    pattern = f"{lm.layers_path(student)}[-1].**" if args.last_block else "**"
    print(f"KL {divergence(teacher, student, held_out):.4f} nats per token on a text held out")
    distill(teacher, student, sequences, args.steps, args.batch, args.learning_rate, pattern)
    print(f"KL {divergence(teacher, student, held_out):.4f} after training")
    lm.save(student, args.folder, source)


def parse(argv: list[str] | None) -> argparse.Namespace:
    small = mx.default_device() == mx.cpu
    parser = argparse.ArgumentParser(description="Train a quantized model to match the original.")
    parser.add_argument("--model", help="a folder or hub id (default: smollm2, made if new)")
    parser.add_argument("--quantized", help="its quantized copy (default: made with --bits)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--text", type=Path, help="a text (default: Python's help)")
    parser.add_argument("--tokens", type=int, default=64 if small else 100_000, help="of the text")
    parser.add_argument("--written", type=int, default=1 if small else 4096, help="sequences")
    parser.add_argument("--length", type=int, default=16 if small else 512, help="of a sequence")
    parser.add_argument("--batch", type=int, default=1 if small else 16, help="sequences in a step")
    parser.add_argument("--steps", type=int, default=2 if small else 1000)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--last-block", action=argparse.BooleanOptionalAction, default=small)
    parser.add_argument("--folder", type=Path, default=Path("smollm2-distilled"))
    return parser.parse_args(argv)


def read(tokenizer: Any, text: Path | None, tokens: int, length: int) -> mx.array:
    """Return the start of a text as an array of sequences x length."""
    words = text.read_text() if text else "\n\n".join(topics[name] for name in sorted(topics))
    ids: list[int] = tokenizer.encode(words[: 10 * tokens], verbose=False)[:tokens]
    return mx.array(ids[: len(ids) // length * length]).reshape(-1, length)


def write(model: Any, text: mx.array, count: int, at_once: int = 512) -> mx.array:
    """Let a model continue random places of a text, in its own words: sequences x length."""
    starts = text[:, : text.shape[1] // START * START].reshape(-1, START)
    starts = starts[mx.random.randint(0, len(starts), (count,))]
    written: list[mx.array] = []
    for at in tqdm(range(0, count, at_once), "writing", disable=None, leave=False):
        tokens = [starts[at : at + at_once]]
        cache = make_prompt_cache(model)
        for _ in range(text.shape[1] - START):
            logits = model(tokens[-1], cache=cache)[:, -1].astype(mx.float32)
            tokens.append(mx.random.categorical(logits)[:, None].astype(mx.int32))
            mx.async_eval(tokens[-1])
        written.append(mx.concatenate(tokens, axis=1))
        mx.eval(written)
    return mx.concatenate(written)


# ---------------------------------------------------------------- training


def distill(
    teacher: Any,
    student: Any,
    sequences: mx.array,
    steps: int,
    batch: int,
    learning_rate: float,
    pattern: str = "**",
) -> None:
    """Train the quantized layers of ``student`` that a pattern matches, in place."""
    originals = dict(teacher.named_modules())
    trained: dict[str, Any] = {}

    def rounded(path: str, layer: Any) -> nn.Module:
        kind = RoundedEmbedding if isinstance(layer, nn.QuantizedEmbedding) else RoundedLinear
        return kind(layer, originals[path].weight)

    student.freeze()
    with swapped(student, pattern, rounded, where=is_affine):  # an interrupted run changes nothing
        train(teacher, student, sequences, steps, batch, learning_rate)
        trained |= select(student, "**", where=Rounded)

    def quantized(path: str, layer: Any) -> nn.Module:
        return trained[path].quantized(layer) if path in trained else layer

    replace_layers(student, "**", quantized, where=is_affine)
    mx.eval(student.parameters())


def is_affine(path: str, layer: Any) -> bool:
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    return isinstance(layer, kinds) and layer.mode == "affine"


def train(
    teacher: Any, student: Any, sequences: mx.array, steps: int, batch: int, learning_rate: float
) -> None:
    """Minimize the KL on batches of sequences, in a new random order in each pass."""
    schedule: Any = optim.cosine_decay(learning_rate, steps)
    optimizer = optim.Adam(schedule, bias_correction=True)
    state = [student.state, optimizer.state]
    gradient = nn.value_and_grad(student, lambda text: divergence_of(teacher, student, text))

    def step(text: mx.array) -> mx.array:
        loss, gradients = gradient(text)
        optimizer.update(student, gradients)
        return loss

    if mx.default_device() != mx.cpu:  # on a CPU, compiling takes longer than it saves
        step = mx.compile(step, inputs=state, outputs=state)
    per_pass = len(sequences) // batch
    for number in (bar := tqdm(range(steps), "training", disable=None, leave=False)):
        at = number % per_pass * batch
        if at == 0:
            sequences = mx.random.permutation(sequences)
        loss = step(sequences[at : at + batch])
        mx.eval(loss, state)
        bar.set_postfix(KL=f"{float(loss):.4f}")


class Rounded(nn.Module):
    """The weight of a quantized layer, in a form that can be trained.

    What is trained is measured in scales, so that one learning rate suits every layer.

    Args:
        layer (mlx.nn.Module): The quantized layer.
        original (mlx.core.array): The weight that was quantized. It says how far each weight is
            from its level. A weight that is farther away than rounding explains, because it was
            not quantized by rounding alone, starts as near to its level as it can.
    """

    def __init__(self, layer: Any, original: mx.array):
        super().__init__()
        self.bits, self.dtype = layer.bits, layer.scales.dtype
        self._scales, self._biases = (
            array.astype(mx.float32)[..., None] for array in (layer.scales, layer.biases)
        )
        keywords = {"group_size": layer.group_size, "bits": layer.bits}
        arrays = (layer.weight, self._scales[..., 0], self._biases[..., 0])
        self.levels = mx.round(self.level(mx.dequantize(*arrays, **keywords)))
        self.levels += mx.clip(self.level(original) - self.levels, -NEAR, NEAR)
        self.stretch, self.shift = mx.zeros_like(self._scales), mx.zeros_like(self._scales)
        if "bias" in layer:
            self.bias = layer.bias

    def level(self, weight: mx.array) -> mx.array:
        groups = mx.unflatten(weight.astype(mx.float32), -1, (self._scales.shape[-2], -1))
        return (groups - self._biases) / self._scales

    def rounded(self) -> tuple[mx.array, mx.array, mx.array]:
        """Return whole levels, and scales and biases as they will be stored."""
        levels = mx.clip(mx.round(self.levels), 0, 2**self.bits - 1)
        scales = self._scales * (1 + SLOWER * self.stretch)
        biases = self._biases + self._scales * (SLOWER * self.shift)
        return levels, scales.astype(self.dtype), biases.astype(self.dtype)

    def weight(self) -> mx.array:
        levels, scales, biases = self.rounded()
        levels = self.levels + mx.stop_gradient(levels - self.levels)
        return (levels * scales + biases).flatten(-2).astype(self.dtype)

    def quantized(self, layer: Any) -> nn.Module:
        """Return a copy of the quantized layer with what was trained."""
        new = copy.copy(layer)
        levels, scales, biases = self.rounded()
        new.weight = packed(levels.flatten(-2).astype(mx.uint32), self.bits)
        new.scales, new.biases = scales[..., 0], biases[..., 0]
        if "bias" in self:
            new.bias = self.bias
        return new


class RoundedLinear(Rounded):
    def __call__(self, x: mx.array) -> mx.array:
        y = x @ self.weight().T
        return y + self.bias if "bias" in self else y


class RoundedEmbedding(Rounded):
    def __call__(self, x: mx.array) -> mx.array:
        return self.weight()[x]

    def as_linear(self, x: mx.array) -> mx.array:
        return x @ self.weight().T


def packed(levels: mx.array, bits: int) -> mx.array:
    """Pack levels as MLX does: a row is a stream of bits, lowest first, in words of 32."""
    stream = (levels[..., None] >> mx.arange(bits, dtype=mx.uint32)) & 1
    words = mx.unflatten(stream.flatten(-2), -1, (-1, 32))
    return (words << mx.arange(32, dtype=mx.uint32)).sum(axis=-1)


def divergence_of(teacher: Any, student: Any, text: mx.array) -> mx.array:
    """Return the KL of the student from the teacher, in nats, as the mean over all tokens."""
    p, q = log_probs(teacher, text), log_probs(student, text)
    return (mx.exp(p) * (p - q)).sum() / text.size


def divergence(teacher: Any, student: Any, text: mx.array, at_once: int = 8) -> float:
    batches = [text[at : at + at_once] for at in range(0, len(text), at_once)]
    return (
        sum(float(divergence_of(teacher, student, one)) * one.size for one in batches) / text.size
    )


def log_probs(model: Any, text: mx.array) -> mx.array:
    logits = model(text).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


if __name__ == "__main__":
    main()
