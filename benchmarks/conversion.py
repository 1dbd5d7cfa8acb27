"""Quantize a model from one folder to another: ``lm.convert`` against ``mlx_lm.convert``."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import mlx.core as mx

from .alone import alone
from .tables import Row, mb, verdict
from .turns import ratio

SHARD = 100  # MB
WORDS = 32_000
# The shapes of TinyLlama, which has 22 blocks.
SHAPE = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": WORDS,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LEAST = {3: 2.0, 22: 5.0}  # blocks -> the least ratio of the peaks, mlx-lm / ours

# The result of `convert`: the peak in bytes, and the seconds.
Found = tuple[int, float]


def random_weights(blocks: int, rounds: int) -> list[Row]:
    """Convert a llama with random weights."""
    with TemporaryDirectory() as folder:
        source = Path(folder, "source")
        size, largest = alone("conversion", "make", str(source), blocks)
        what = f"llama, {blocks} blocks"
        return [_compare(what, source, size, largest, rounds, LEAST.get(blocks))]


def smollm2(rounds: int) -> list[Row]:
    """Convert SmolLM2, which examples/smollm2.py makes."""
    with TemporaryDirectory() as folder:
        source = Path(folder, "source")
        size, largest = alone("conversion", "make_smollm2", str(source))
        return [_compare("SmolLM2-135M", source, size, largest, rounds, None)]


def _compare(
    what: str, source: Path, size: int, largest: int, rounds: int, least: float | None
) -> Row:
    """Convert in both ways, alternately, each time in a new process."""
    ways = ["ours", "mlx_lm"]
    found: dict[str, list[Found]] = {way: [] for way in ways}
    targets = {way: source.parent / way for way in ways}
    for _ in range(rounds):
        for way in ways:
            _remove(targets[way])
            found[way].append(alone("conversion", "convert", way, str(source), str(targets[way])))
        ways.reverse()  # the other way goes first in the next round
    count = alone("conversion", "count_equal", *map(str, targets.values()))
    peaks = {way: max(peak for peak, _ in found[way]) for way in ways}
    most = SHARD * 10**6 + 1.5 * largest
    better = peaks["mlx_lm"] / peaks["ours"]
    times = {way: [seconds for _, seconds in found[way]] for way in ways}
    slower = ratio(times["ours"], times["mlx_lm"])
    goal = f"{mb(most)}, {f'{least:g} x, ' if least else ''}1.1 x the time"
    met = peaks["ours"] <= most and better >= (least or 0) and slower <= 1.1
    seconds = [f"{median(times[way]):.1f}" for way in ("ours", "mlx_lm")]
    return {
        "model": what,
        "weights": mb(size),
        "largest module": mb(largest),
        "peak, ours": mb(peaks["ours"]),
        "peak, mlx-lm": mb(peaks["mlx_lm"]),
        "mlx-lm / ours": f"**{better:.1f}**",
        "time, ours / mlx-lm": f"**{slower:.2f}**",
        "seconds": " / ".join(seconds),
        "equal arrays": f"{count:,} of {count:,}",
        "goal": goal,
        "verdict": verdict(met),
    }


def _remove(folder: Path) -> None:
    if folder.exists():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


# ---------------------------------------------------------------- called in a new process


def make(folder: str, blocks: int) -> tuple[int, int]:
    """Write a llama with random weights. Return their bytes, and those of the largest layer."""
    from mlx_lm import utils
    from mlx_lm.models import llama

    config = {**SHAPE, "num_hidden_layers": blocks}
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    utils.save_model(folder, model, donate_model=True)
    Path(folder, "config.json").write_text(json.dumps(config))
    _write_tokenizer(Path(folder))
    return _sizes(folder)


def make_smollm2(folder: str) -> tuple[int, int]:
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    example: Any = import_module("smollm2")
    example.make(folder)
    return _sizes(folder)


def _sizes(folder: str) -> tuple[int, int]:
    """The bytes of all weights, and of the largest one, which is the only one in its layer."""
    sizes = [array.nbytes for array in _load(folder).values()]
    return sum(sizes), max(sizes)


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer with one word, because `mlx_lm.convert` loads and saves a tokenizer."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "a"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def convert(way: str, source: str, target: str) -> Found:
    """Quantize all layers to 4 bits with `lm.convert` or `mlx_lm.convert`."""
    from mlx_modswap import lm

    # `mlx_lm.convert` is the function or the module, depending on what was imported before.
    theirs: Any = import_module("mlx_lm.convert").convert
    mx.reset_peak_memory()
    start = perf_counter()
    if way == "ours":
        lm.convert(source, target, {"**": 4}, max_shard_mb=SHARD)
    else:
        with redirect_stdout(sys.stderr):  # stdout holds the result of this process
            theirs(source, target, quantize=True, q_bits=4)
    mx.synchronize()
    return mx.get_peak_memory(), perf_counter() - start


def count_equal(ours: str, theirs: str) -> int:
    """Check that all arrays are equal, and return how many there are."""
    a, b = _load(ours), _load(theirs)
    assert a.keys() == b.keys(), "the names differ"
    for name in list(a):
        x, y = a.pop(name), b.pop(name)
        assert x.dtype == y.dtype, f"{name} has another dtype"
        assert mx.array_equal(x, y), f"{name} differs"
    return len(_load(ours))


def _load(folder: str) -> dict[str, mx.array]:
    files = sorted(Path(folder).glob("*.safetensors"))
    loaded: list[Any] = [mx.load(str(file)) for file in files]
    return {name: array for arrays in loaded for name, array in arrays.items()}


CASES = {
    "conversion, SmolLM2": ("conversion", "smollm2", 3),
    "conversion, 0.26 billion": ("conversion", "random_weights", 3, 3),
    "conversion, 0.53 billion": ("conversion", "random_weights", 9, 3),
    "conversion, 1.1 billion": ("conversion", "random_weights", 22, 3),
}
