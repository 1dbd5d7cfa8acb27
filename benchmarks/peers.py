"""What else a user could do at the same size: ways of mlx-lm, and examples of this project.

::

    python -m benchmarks.peers                                   # all ways; needs a GPU
    python -m benchmarks.peers --bits 3 --ways uniform awq uniform+dwq@3e-5 uniform+distill@0.01

A way is ``START`` or ``START+TRAINING@RATE``, and the latter may end in ``:TEXT``. The start
quantizes the model: ``uniform``, ``awq``, ``gptq`` or ``chosen``, with the rules that
examples/mixed_precision.py finds. The training changes what the quantized layers hold: ``dwq``
also trains the norms, as mlx-lm does, ``dwq-layers`` does not, and ``distill`` is
examples/distill_quantized.py. The text is ``help`` (Python's help), ``docs`` (docstrings of
Python's library), ``written`` (sequences that the original model wrote) or ``all`` of these.

Every way makes a folder, and what ``mlx_lm.load`` makes of it is judged on a part of Python's help
that no way saw. Settings are to be chosen by the column for another part, which was held out. A row
is printed as soon as it is known.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize
from mlx_lm.quant.dwq import dwq_quantize
from mlx_lm.quant.gptq import gptq_quantize

from mlx_modswap import lm

from .texts import docstrings, python_help

sys.path.append(str(Path(__file__).parent.parent / "examples"))
mixed: Any = importlib.import_module("mixed_precision")
distilling: Any = importlib.import_module("distill_quantized")
smollm2: Any = importlib.import_module("smollm2")

GROUP_SIZE = 64
COLUMNS = ("way", "MB", "KL", "KL, held out", "seconds")
WAYS = (
    "uniform",
    "awq",
    "uniform+dwq@1e-5",
    "uniform+dwq@3e-5",
    "uniform+distill@0.01",
    "awq+dwq@3e-5",
    "uniform+dwq@3e-5:all",
    "uniform+dwq-layers@3e-5",
    "chosen",
    "chosen+dwq@3e-5",
    "chosen+distill@0.01",
    "gptq",
    "gptq+dwq@3e-5",
    "gptq+distill@0.01",
)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    print(f"Python {platform.python_version()}, MLX {version('mlx')}, mlx-lm {version('mlx-lm')},")
    print(f"{mx.device_info().get('device_name', 'CPU')}, {date.today()}")
    original = Original(args)
    for bits in args.bits:
        print(f"\n{bits} bits\n\n{line(COLUMNS)}\n{line(['---'] * len(COLUMNS))}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            bench = Bench(original, args, bits, Path(scratch))
            for way in args.ways:
                print(line(cells(bench, way)), flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare ways to quantize a model at one size.")
    parser.add_argument("--model", help="a folder (default: SmolLM2 in bfloat16, made if new)")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--ways", nargs="+", default=WAYS)
    parser.add_argument("--length", type=int, default=512, help="of a sequence, in tokens")
    parser.add_argument("--train", type=int, default=60_000, help="tokens of the help, at most")
    parser.add_argument("--judged", type=int, default=24_576, help="tokens of the help")
    parser.add_argument("--docs", type=int, default=500_000, help="tokens of docstrings")
    parser.add_argument("--written", type=int, default=2048, help="sequences")
    parser.add_argument("--grid", type=int, default=20, help="of AWQ")
    parser.add_argument("--rounds", type=int, default=8, help="of the choice of bits")
    parser.add_argument("--passes", type=int, default=3, help="of DWQ, through the help")
    parser.add_argument("--steps", type=int, default=1000, help="of distill")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step of distill")
    args = parser.parse_args(argv)
    args.model = args.model or str(smollm2.make("smollm2-bfloat16", "bfloat16"))
    return args


def line(texts: Any) -> str:
    return f"| {' | '.join(texts)} |"


def cells(bench: Bench, way: str) -> list[str]:
    try:
        with redirect_stdout(sys.stderr):
            made = bench.make(way)
            judged = bench.judge(made.folder)
    except Exception as error:  # the other ways still get their rows
        traceback.print_exc()
        return [way, *[""] * (len(COLUMNS) - 2), f"{type(error).__name__}: {error}"]
    megabytes, *kls = judged
    return [way, f"{megabytes:.1f}", *(f"{kl:.4f}" for kl in kls), f"{made.seconds:.0f}"]


class Original:
    """The model to quantize, and texts; what takes long is made when it is first needed."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.model, self.tokenizer, *_ = mlx_lm.load(args.model)
        self.dtype = next(array.dtype for _, array in flat(self.model))
        self.help = python_help(self.tokenizer, args.train, args.judged, args.length)

    @cached_property
    def docs(self) -> mx.array:
        return docstrings(self.tokenizer, self.args.docs, self.args.length)

    @cached_property
    def written(self) -> mx.array:
        mx.random.seed(0)
        starts = mx.concatenate([self.help.train, self.docs])
        return distilling.write(self.model, starts, self.args.written)

    def text(self, name: str) -> mx.array:
        if name == "all":
            return mx.concatenate([self.help.train, self.docs, self.written])
        return self.help.train if name == "help" else getattr(self, name)


class Made(NamedTuple):
    folder: Path
    seconds: float  # without those for the texts


class Bench:
    """Makes folders from a model, with a number of bits."""

    def __init__(self, original: Original, args: argparse.Namespace, bits: int, scratch: Path):
        self.original, self.args, self.bits, self.scratch = original, args, bits, scratch
        self.made: dict[str, Made] = {}
        self.starts: dict[str, Callable[[], nn.Module]] = {
            "uniform": self.uniform,
            "awq": self.awq,
            "gptq": self.gptq,
            "chosen": self.chosen,
        }
        self.trainings: dict[str, Callable[[nn.Module, float, mx.array], None]] = {
            "dwq": self.dwq,
            "dwq-layers": self.dwq_layers,
            "distill": self.distill,
        }

    def make(self, way: str) -> Made:
        """Make the folder of a way, unless it was made before."""
        if way in self.made:
            return self.made[way]
        start, plus, rest = way.partition("+")
        if not plus:
            begin, before, model = time.perf_counter(), 0.0, self.starts[start]()
        else:
            folder, before = self.make(start)
            training, _, rest = rest.partition("@")
            rate, _, text = rest.partition(":")
            sequences = self.original.text(text or ("all" if training == "distill" else "help"))
            model = load(folder)
            begin = time.perf_counter()
            mx.random.seed(0)
            self.trainings[training](model, float(rate), sequences)
        mx.eval(model.parameters())
        seconds = before + time.perf_counter() - begin
        target = self.scratch / str(len(self.made))
        lm.save(model, target, self.args.model)
        self.made[way] = Made(target, seconds)
        return self.made[way]

    def judge(self, folder: Path) -> list[float]:
        """Return the megabytes of the arrays, and the KL on the judged and the held-out text."""
        model = load(folder)
        megabytes = sum(array.nbytes for _, array in flat(model)) / 1e6
        texts = (self.original.help.judged, self.original.help.held_out)
        kls = [distilling.divergence(self.original.model, model, text) for text in texts]
        return [megabytes, *kls]

    # ------------------------------------------------------------ starts

    def uniform(self) -> nn.Module:
        model = load(self.args.model)
        lm.quantize(model, {"**": self.bits}, group_size=GROUP_SIZE)
        return model

    def awq(self) -> nn.Module:
        model = load(self.args.model)
        config = AWQ_MODEL_CONFIGS[model.model_type]
        bits = {"bits": self.bits, "embed_bits": self.bits, "n_grid": self.args.grid}
        sizes = {"group_size": GROUP_SIZE, "embed_group_size": GROUP_SIZE}
        awq_quantize(model, self.original.help.train, config, **bits, **sizes)
        return model

    def gptq(self) -> nn.Module:
        """Run mlx-lm's GPTQ in float32: in half precision its sums of products are too inexact."""
        model = load(self.args.model)
        model.set_dtype(mx.float32)
        settings = (self.bits, GROUP_SIZE)  # for linear layers, and for the embedding
        gptq_quantize(model, self.original.help.train, *settings, *settings)
        model.set_dtype(self.original.dtype)
        return model

    def chosen(self) -> nn.Module:
        budget = sum(array.nbytes for _, array in flat(self.uniform()))
        model = load(self.args.model)
        lm.quantize(model, chosen_rules(self.original, budget, self.args.rounds))
        return model

    # ------------------------------------------------------------ trainings

    def dwq(self, model: nn.Module, rate: float, sequences: mx.array) -> None:
        """Run mlx-lm's DWQ: some passes over the help, or as much of a longer text as distill."""
        count = self.args.steps * self.args.batch
        if sequences is self.original.help.train:
            count = self.args.passes * len(sequences)
        held_out = self.original.help.held_out
        dwq_quantize(
            model,
            lambda batch, *_, **__: self.original.model(batch),
            optim.Adam(rate, bias_correction=True),
            [(one.tolist(), 0) for one in shuffled(sequences, count)],
            [(one.tolist(), 0) for one in held_out],
            batch_size=min(4, len(held_out)),
            max_seq_length=self.args.length,
            seed=0,
            dtype=self.original.dtype,
        )

    def dwq_layers(self, model: nn.Module, rate: float, sequences: mx.array) -> None:
        model.freeze()
        self.dwq(model, rate, sequences)

    def distill(self, model: nn.Module, rate: float, sequences: mx.array) -> None:
        settings = (self.args.steps, self.args.batch, rate)
        distilling.distill(self.original.model, model, sequences, *settings)


def chosen_rules(original: Original, budget: int, rounds: int) -> dict[Any, Any]:
    """Let examples/mixed_precision.py choose the bits of each layer."""
    search = mixed.Search(load(original.args.model), original.help.train[::2])
    choice = search.choose(budget + 1, rounds)
    return {tuple(paths): setting for paths, setting in mixed.rules(search.parts, choice)}


def shuffled(sequences: mx.array, count: int) -> mx.array:
    """Return so many sequences, in a new random order in each pass."""
    passes = [mx.random.permutation(sequences) for _ in range(0, count, len(sequences))]
    return mx.concatenate(passes)[:count]


def load(folder: Any) -> Any:
    model, *_ = mlx_lm.load(str(folder))
    return model


def flat(model: nn.Module) -> list[tuple[str, mx.array]]:
    arrays: Any = tree_flatten(model.parameters())
    return arrays


if __name__ == "__main__":
    main()
