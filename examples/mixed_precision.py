"""Find out how many bits each layer of a language model needs, and write rules that say so.

::

    python examples/mixed_precision.py                                  # SmolLM2, see smollm2.py
    python examples/mixed_precision.py --model FOLDER --text FILE --bits-per-weight 4.5
    mlx_modswap convert smollm2 smollm2-chosen --rules rules.json

The loss is measured as the Kullback-Leibler divergence (KL) of the next-token distributions from
those of the original model, on the first half of a text. The choice is judged on the second half,
which had no part in it. The search has three steps:

1. Each layer alone is rounded to each setting, and put back (``swapped``).
2. All layers start at the same setting. Again and again the upgrade that gains most per byte is
   made, until the size is reached. This is done from each setting that fits. The best of these
   choices would be the answer if the losses of the layers simply added up.
3. They do not. So the next rounds measure each layer again, up to two settings up or down, while
   the other layers are as chosen. Upgrades, with downgrades that pay for them, are tried one by
   one, the most promising first, and kept if the measured KL falls.

To be fast, a round measures its layers on a third of the sequences, and the next round on another
third. But all sequences decide what is kept: a choice made on little text fits that text and not
the language.

Without a GPU, only a small part of the model is searched, on a short text; ``--layers`` and
``--tokens`` say how much.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import smollm2
from mlx.utils import tree_flatten

from mlx_modswap import Replacement, select, swapped

try:
    import mlx_lm
    from tqdm import tqdm

    from mlx_modswap import lm
except ImportError:
    sys.exit("mlx-lm is not installed: pip install 'mlx-modswap[lm]'")


class Setting(NamedTuple):
    bits: int
    group_size: int


class Part(NamedTuple):
    """A layer to quantize, with all of its paths, and its size in each setting, in bytes."""

    paths: tuple[str, ...]
    layer: Any
    sizes: list[float]


# From small to large. A group has a scale and a bias of 16 bits each.
SETTINGS = [Setting(bits, 64) for bits in (2, 3, 4, 5, 6, 8)]
FOUR_BITS = SETTINGS.index(Setting(4, 64))
REACH = 2  # settings up or down, in a round
PROMISING = 60  # upgrades, and as many downgrades, from which the exchanges are made
MOST_TRIES = 60  # in a round
SAMPLES = 3  # of the text; each round measures on one of them
AT_ONCE = 4096  # tokens, in one call of the model
ENOUGH = 2048  # tokens; a choice made on fewer fits these tokens and not the language

Choice = list[int]  # the number of the setting of each part
Move = tuple[int, int]  # the number of a part, and the number of a new setting
Exchange = tuple[Move, ...]  # one move, or an upgrade and a downgrade that pays for it


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    source = args.model or str(smollm2.make("smollm2"))
    model, tokenizer, *_ = mlx_lm.load(source)
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)  # the fastest dtype on a CPU
    first, second = halves(tokenizer, args.text, args.tokens)
    search = Search(model, first, args.layers)

    budget = search.budget(args.size, args.bits_per_weight)
    choice = search.choose(budget, args.rounds)
    print_table(search.parts, choice)
    draw(search.parts, choice, args.picture)
    args.rules.write_text(json.dumps(rules(search.parts, choice), indent=1) + "\n")

    judge = Meter(model, second)
    for name, one in (("chosen", choice), ("4 bits", [FOUR_BITS] * len(choice))):
        with search.put(one):
            print(f"{name}: {search.size(one) / 1e6:.1f} MB, KL {judge():.4f} nats per token")
    if args.tokens < ENOUGH:
        print(f"{args.tokens} tokens only show how it works: use --tokens {ENOUGH} or more")
    print(f"\nmlx_modswap convert {source} {args.rules.stem}-model --rules {args.rules}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    small = mx.default_device() == mx.cpu
    parser = argparse.ArgumentParser(description="Choose the bits of each layer by measurement.")
    parser.add_argument("--model", help="a folder or hub id (default: smollm2, made if new)")
    parser.add_argument("--text", type=Path, help="a text to measure on (default: Python's help)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", type=float, help="of all weights in MB (default: as with 4 bits)")
    size.add_argument("--bits-per-weight", type=float, help="the same, as an average")
    parser.add_argument("--layers", type=int, default=1 if small else None, help="how many blocks")
    parser.add_argument("--tokens", type=int, default=4 if small else 24_576, help="of each half")
    parser.add_argument("--rounds", type=int, default=1 if small else 8)
    parser.add_argument("--rules", type=Path, default=Path("rules.json"))
    parser.add_argument("--picture", type=Path, default=Path("bits.png"))
    return parser.parse_args(argv)


def halves(tokenizer: Any, text: Path | None, tokens: int) -> tuple[mx.array, mx.array]:
    """Return evenly spread sequences from each half of a text: arrays of sequences x length."""
    words = text.read_text() if text else "\n\n".join(topics[name] for name in sorted(topics))
    ids: list[int] = tokenizer.encode(words, verbose=False)  # no warning about the length
    length = min(512, tokens)
    count = max(1, tokens // length)
    if len(ids) < 2 * count * length:
        sys.exit(f"the text has {len(ids)} tokens, too few for two halves of {count * length}")
    step = len(ids) // (2 * count)
    sequences = mx.array([ids[at * step : at * step + length] for at in range(2 * count)])
    return sequences[:count], sequences[count:]


class Meter:
    """Measures how far a model is from the model as it was when the meter was made."""

    def __init__(self, model: Any, sequences: mx.array):
        self.model = model
        at_once = max(1, AT_ONCE // sequences.shape[1])
        self.batches = [sequences[at : at + at_once] for at in range(0, len(sequences), at_once)]
        self.tokens = sequences.size
        self.original = [self.log_probs(batch) for batch in self.batches]
        mx.eval(self.original)

    def log_probs(self, batch: mx.array) -> mx.array:
        logits = self.model(batch).astype(mx.float32)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def __call__(self) -> float:
        """Return the KL divergence from the original, in nats, as the mean over all tokens."""
        total = 0.0
        for p, batch in zip(self.original, self.batches):
            total += float((mx.exp(p) * (p - self.log_probs(batch))).sum())
        return total / self.tokens


class Search:
    """Chooses a setting for each part of a model under a budget of bytes."""

    def __init__(self, model: Any, sequences: mx.array, blocks: int | None = None):
        self.model = model
        pattern = "**" if blocks is None else f"{lm.layers_path(model)}[:{blocks}].**"
        self.parts = parts(model, pattern)
        arrays: Any = tree_flatten(model.parameters())
        self.other_bytes = sum(array.nbytes for _, array in arrays) - sum(
            part.layer.weight.nbytes for part in self.parts
        )
        samples = range(min(SAMPLES, len(sequences)))
        self.meters = [Meter(model, sequences[at::SAMPLES]) for at in samples]
        self.alone: dict[Move, float] | None = None

    def size(self, choice: Choice) -> float:
        """Return the bytes of the whole model."""
        return self.other_bytes + sum(
            part.sizes[setting] for part, setting in zip(self.parts, choice)
        )

    def budget(self, megabytes: float | None, bits_per_weight: float | None) -> float:
        """Return the bytes that were asked for, or the bytes of 4 bits everywhere."""
        if megabytes is not None:
            return 1e6 * megabytes
        if bits_per_weight is not None:
            arrays: Any = tree_flatten(self.model.parameters())
            return bits_per_weight * sum(array.size for _, array in arrays) / 8
        return self.size([FOUR_BITS] * len(self.parts))

    def put(self, choice: Choice) -> AbstractContextManager[Replacement]:
        """Return a context manager inside which every part is rounded as chosen."""
        factories = zip(self.parts, map(rounded, choice))
        return swapped(self.model, {part.paths: factory for part, factory in factories})

    def choose(self, budget: float, rounds: int) -> Choice:
        """Find the choice with the least KL that fits into the budget."""
        if not self.fitting(budget):
            smallest = self.size([0] * len(self.parts))
            sys.exit(f"{budget / 1e6:.1f} MB is too small: the least is {smallest / 1e6:.1f} MB")
        if self.alone is None:
            places = range(len(self.parts))
            moves = [(at, setting) for at in places for setting in range(len(SETTINGS))]
            self.alone = self.measure(moves, self.meters[0], "each layer alone")
        starts = [self.fill(self.alone, lowest, budget) for lowest in self.fitting(budget)]
        best, choice = min((self.loss(start), start) for start in starts)
        idle = 0
        for number in range(rounds):
            meter = self.meters[number % len(self.meters)]
            choice, best, made = self.improve(choice, best, budget, meter)
            tqdm.write(f"round {number + 1}: KL {best:.4f} after {made} exchanges")
            idle = 0 if made else idle + 1
            if idle == len(self.meters):
                break
        return choice

    def loss(self, choice: Choice) -> float:
        """Return the KL of a choice, on all of the text."""
        with self.put(choice):
            total = sum(meter() * meter.tokens for meter in self.meters)
        return total / sum(meter.tokens for meter in self.meters)

    def measure(self, moves: list[Move], meter: Meter, title: str) -> dict[Move, float]:
        """Return the KL after each move alone, starting from the model as it is."""
        found: dict[Move, float] = {}
        for at, setting in tqdm(moves, title, disable=None, leave=False):
            with swapped(self.model, self.parts[at].paths, rounded(setting)):
                found[at, setting] = meter()
        return found

    def fitting(self, budget: float) -> list[int]:
        """Return the settings that fit into the budget if every part gets the same one."""
        settings = range(len(SETTINGS))
        return [one for one in settings if self.size([one] * len(self.parts)) <= budget]

    def fill(self, alone: dict[Move, float], lowest: int, budget: float) -> Choice:
        """Start with one setting for every part, then upgrade what gains most per byte."""
        choice = [lowest] * len(self.parts)
        spare = budget - self.size(choice)
        while True:
            best: tuple[float, Move] = (0.0, (-1, -1))
            for (at, setting), kl in alone.items():
                more = self.more(choice, (at, setting))
                if 0 < more <= spare:
                    gain = (alone[at, choice[at]] - kl) / more
                    best = max(best, (gain, (at, setting)))
            gain, (at, setting) = best
            if gain <= 0:
                return choice
            spare -= self.more(choice, (at, setting))
            choice[at] = setting

    def improve(
        self, choice: Choice, best: float, budget: float, meter: Meter
    ) -> tuple[Choice, float, int]:
        """Run a round; return the choice after it, its KL, and how many exchanges were made."""
        near = [
            (at, setting)
            for at, now in enumerate(choice)
            for setting in range(len(SETTINGS))
            if 0 < abs(setting - now) <= REACH
        ]
        with self.put(choice):
            here = meter()
            measured = self.measure(near, meter, "each layer, the others as chosen")
        change = {move: kl - here for move, kl in measured.items()}
        more = {move: self.more(choice, move) for move in near}
        made = 0
        for _ in range(MOST_TRIES):
            exchange = most_promising(change, more, budget - self.size(choice))
            promised = sum(change[move] for move in exchange)
            if promised >= 0:
                break
            new = list(choice)
            for at, setting in exchange:
                new[at] = setting
            kl = self.loss(new)
            if kl < best:
                choice, best, made = new, kl, made + 1
                moved = {at for at, _ in exchange}
                change = {move: kl for move, kl in change.items() if move[0] not in moved}
            else:  # the moves of the exchange promised too much
                change |= {move: change[move] - promised for move in exchange}
        return choice, best, made

    def more(self, choice: Choice, move: Move) -> float:
        """Return how many bytes a move adds."""
        at, setting = move
        return self.parts[at].sizes[setting] - self.parts[at].sizes[choice[at]]


def most_promising(change: dict[Move, float], more: dict[Move, float], spare: float) -> Exchange:
    """Return the exchange that fits and would lower the KL most if the changes added up."""
    order = sorted(change, key=lambda move: change[move] / abs(more[move]))
    ups = [move for move in order if more[move] > 0][:PROMISING]
    downs = [move for move in order if more[move] < 0][:PROMISING]
    exchanges: list[Exchange] = [(move,) for move in ups + downs]
    exchanges += [(up, down) for up in ups for down in downs if up[0] != down[0]]
    fitting = [one for one in exchanges if sum(more[move] for move in one) <= spare]
    return min(fitting, key=lambda one: sum(change[move] for move in one), default=())


def parts(model: Any, pattern: str) -> list[Part]:
    """Return the layers to quantize: those that ``mlx_lm.convert`` would quantize."""
    wanted: Callable[..., Any] = getattr(model, "quant_predicate", None) or (lambda *_: True)

    def quantizable(path: str, layer: Any) -> bool:
        if not hasattr(layer, "to_quantized") or layer.weight.shape[-1] % 64:
            return False
        return bool(wanted(path, layer))

    paths: dict[int, tuple[str, ...]] = {}
    layers: dict[int, Any] = {}
    for path, layer in select(model, pattern, where=quantizable).items():
        layers[id(layer)] = layer
        paths[id(layer)] = (*paths.get(id(layer), ()), path)
    return [Part(paths[key], layer, sizes(layer.weight)) for key, layer in layers.items()]


def sizes(weight: mx.array) -> list[float]:
    scale = 2 * weight.dtype.size  # bytes of the scale and the bias of a group
    return [weight.size * (bits / 8 + scale / group_size) for bits, group_size in SETTINGS]


def rounded(setting: int) -> Callable[[str, Any], nn.Module]:
    """Return a factory of layers whose weights have the values of quantized weights.

    The layers compute what quantized layers do, at the speed of plain layers.
    """
    bits, group_size = SETTINGS[setting]

    def factory(path: str, layer: Any) -> nn.Module:
        new = copy.copy(layer)
        packed = mx.quantize(layer.weight, group_size=group_size, bits=bits)
        new.weight = mx.dequantize(*packed, group_size=group_size, bits=bits)
        return new

    return factory


# ---------------------------------------------------------------- what was chosen


def rules(parts: list[Part], choice: Choice) -> list[Any]:
    """Return the rules for ``mlx_modswap convert``: patterns and keywords of ``to_quantized``."""
    return [
        [
            [path for part, one in zip(parts, choice) if one == number for path in part.paths],
            setting._asdict(),
        ]
        for number, setting in enumerate(SETTINGS)
        if number in choice
    ]


def print_table(parts: list[Part], choice: Choice) -> None:
    """Print how many layers of each name got how many bits."""
    counts = Counter((name_of(part), setting) for part, setting in zip(parts, choice))
    used = sorted(set(choice))
    titles = [f"{SETTINGS[at].bits} bits, {SETTINGS[at].group_size}" for at in used]
    print(" ".join([" " * 16, *(f"{title:>10}" for title in titles)]))
    for name in dict.fromkeys(map(name_of, parts)):
        cells = (counts[name, setting] or "" for setting in used)
        print(" ".join([f"{name:16}", *(f"{cell:>10}" for cell in cells)]))


def draw(parts: list[Part], choice: Choice, file: Path) -> None:
    """Draw a picture with a row for each name of a layer and a column for each block."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(map(name_of, parts)))
    blocks = list(dict.fromkeys(map(block_of, parts)))
    grid = [[float("nan")] * len(blocks) for _ in names]
    for part, setting in zip(parts, choice):
        bits, group_size = SETTINGS[setting]
        grid[names.index(name_of(part))][blocks.index(block_of(part))] = bits + 32 / group_size
    figure = Figure(figsize=(3 + len(blocks) / 4, 1 + len(names) / 3), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="viridis", aspect="auto", vmin=2.5, vmax=8.5)
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(len(blocks)), blocks, rotation=90)
    figure.colorbar(image, label="bits per weight")
    figure.savefig(file, dpi=150)


def name_of(part: Part) -> str:
    return part.paths[0].rpartition(".")[2]


def block_of(part: Part) -> str:
    return next((piece for piece in part.paths[0].split(".") if piece.isdecimal()), "")


if __name__ == "__main__":
    main()
