"""Measure how much each block of all-MiniLM-L6-v2 moves the embedding of a sentence.

::

    pip install matplotlib
    python examples/block_study.py
    python examples/block_study.py --model DIR --out FILE

The embedding after a block is computed with the output of that block in place of the output of the
last block. Also, each block is skipped once: its input takes the place of its output.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import minilm
import mlx.core as mx
import quantize_minilm

from mlx_modswap import capture, patch

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tokenizers import Tokenizer


SENTENCES = quantize_minilm.SENTENCES[::2]


class Effect(NamedTuple):
    """What a block does, as angles in degrees. Each is the mean over all sentences."""

    block: str
    moves: float  # from the embedding before the block to the one after it
    remains: float  # from the embedding after the block to the final one
    skipped: float  # from the final embedding to the one without the block


def study(model: minilm.Bert, tokenizer: Tokenizer) -> list[Effect]:
    with capture(model, ["embeddings", "encoder.layer.*"]) as outputs:
        final = minilm.embed(model, tokenizer, SENTENCES)

    def with_output(block: str, state: mx.array) -> mx.array:
        with patch(model, block, lambda path, output: state):
            return minilm.embed(model, tokenizer, SENTENCES)

    (_, state), *blocks = ((path, output) for path, (output,) in outputs.items())
    here = with_output("encoder.layer[-1]", state)
    effects = []
    for block, after in blocks:
        there = with_output("encoder.layer[-1]", after)
        without = with_output(block, state)
        angles = angle(here, there), angle(there, final), angle(final, without)
        effects.append(Effect(block, *angles))
        state, here = after, there
    return effects


def angle(a: mx.array, b: mx.array) -> float:
    """Return the mean angle between vectors of length one, in degrees."""
    # For small angles arccos(a @ b) would be mostly rounding error.
    angles = 2 * mx.arcsin(mx.minimum(mx.linalg.norm(a - b, axis=-1) / 2, 1))
    return float(mx.degrees(angles).mean())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="See what each block does to an embedding.")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a folder with config.json, model.safetensors and tokenizer.json "
        "of a BERT (default: the installed all-MiniLM-L6-v2)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        default=Path("block_study.png"),
        help="where to put the plot (default: block_study.png)",
    )
    args = parser.parse_args(argv)

    figure = empty_figure()
    model, tokenizer = minilm.load(args.model)
    effects = study(model, tokenizer)

    print(f"{len(SENTENCES)} sentences, mean angles in degrees")
    print()
    print(f"{'block':<18}{'moves it by':>13}{'still to go':>13}{'if skipped':>13}")
    for block, *angles in effects:
        print(f"{block:<18}" + "".join(f"{degrees:13.1f}" for degrees in angles))
    draw(figure, effects)
    try:
        figure.savefig(args.out)
    except (OSError, ValueError) as error:  # no such folder, or no such format
        raise SystemExit(f"{args.out} cannot be written: {error}") from None
    print()
    print(f"plot               {args.out}")


def empty_figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("matplotlib is not installed: pip install matplotlib") from None
    return Figure(figsize=(7, 4), dpi=150, layout="constrained")


def draw(figure: Figure, effects: list[Effect]) -> None:
    axes = figure.add_subplot()
    places = range(len(effects))
    axes.bar(places, [effect.moves for effect in effects], color="#86b6e5", label="moves it by")
    axes.plot(places, [effect.remains for effect in effects], "o-", label="still to go")
    axes.plot(places, [effect.skipped for effect in effects], "s--", label="if skipped")
    axes.set_xticks(places, [effect.block.rpartition(".")[2] for effect in effects])
    axes.set_xlabel("block")
    axes.set_ylabel("angle in degrees")
    axes.set_title("What each block does to the embedding of a sentence")
    axes.legend()


if __name__ == "__main__":
    main()
