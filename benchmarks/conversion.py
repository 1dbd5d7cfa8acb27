"""Quantize a model from one folder to another: ``lm.convert`` against ``mlx_lm.convert``.

python -m benchmarks --only conversion           # SmolLM2, and llamas with random weights
python -m benchmarks.conversion 8                # a llama of 8 billion: writes 16 GB, then 4.5 GB
python -m benchmarks.conversion 8 --folder DIR   # where the disk has room
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from shutil import rmtree
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import mlx.core as mx

from .tables import Row, markdown, mb, verdict, versions
from .timing import alone, ratio

WAYS = ("ours", "mlx-lm")
# width, hidden width, heads of keys and values, words
TINY_LLAMA = (2048, 5632, 4, 32_000)
LLAMA_3_8B = (4096, 14_336, 8, 128_256)


def llama_config(blocks: int, width: int, hidden: int, heads: int, words: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": blocks,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_attention_heads": 32,
        "num_key_value_heads": heads,
        "vocab_size": words,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def compare(make: str, *arguments: Any, rounds: int = 3, root: str | None = None) -> list[Row]:
    """Convert a model in both ways, alternately, each time in a new process."""
    with TemporaryDirectory(dir=root) as folder:
        what, size, largest = alone("conversion", make, f"{folder}/source", *arguments)
        found: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in WAYS}
        arrays: dict[str, Any] = {}
        for index in range(rounds):
            for way in WAYS[:: (-1) ** index]:  # the other way goes first in the next round
                target = f"{folder}/converted"
                for name, figure in alone("conversion", "convert", way, folder, target).items():
                    found[way][name].append(figure)
                if way not in arrays:
                    arrays[way] = alone("conversion", "digests", target)
                rmtree(target)  # the disk may not have room for both
    assert arrays["ours"] == arrays["mlx-lm"], "the arrays differ"
    ours, theirs = found["ours"], found["mlx-lm"]
    peak, most = max(ours["peak"]), 1.35 * largest + 100e6
    slower = ratio(ours["seconds"], theirs["seconds"])

    def both(name: str) -> str:
        return " / ".join(mb(max(found[way][name])) for way in WAYS)

    return [
        {
            "model": what,
            "weights": mb(size),
            "largest array": mb(largest),
            "peak, ours / mlx-lm": both("peak"),
            "mlx-lm / ours": f"**{max(theirs['peak']) / peak:.1f}**",
            "resident, ours / mlx-lm": both("resident"),
            "time, ours / mlx-lm": f"**{slower:.2f}**",
            "seconds": " / ".join(f"{median(found[way]['seconds']):.1f}" for way in WAYS),
            "written": both("written"),
            "equal arrays": f"{len(arrays['ours']):,} of {len(arrays['mlx-lm']):,}",
            "goal": f"{mb(most)}, 0.9 x the time",
            "verdict": verdict(peak <= most and slower <= 0.9),
        }
    ]


# ---------------------------------------------------------------- called in a new process


def make_random(source: str, billions: float) -> tuple[str, int, int]:
    """Write a llama with random weights, of which at most a shard is in memory."""
    from mlx_lm import utils
    from mlx_lm.models import llama
    from tokenizers import Tokenizer, models

    shape = LLAMA_3_8B if billions > 4 else TINY_LLAMA
    width, hidden, heads, words = shape
    block = 2 * width**2 * (1 + heads / 32) + 3 * width * hidden
    blocks = round((1e9 * billions - 2 * words * width) / block)
    config = llama_config(max(blocks, 1), *shape)
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))  # its arrays are lazy
    model.set_dtype(mx.bfloat16)
    utils.save_model(source, model, donate_model=True)
    Path(source, "config.json").write_text(json.dumps(config))
    # `mlx_lm.convert` loads and saves a tokenizer, so this one has one word.
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(f"{source}/tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "a"}
    Path(source, "tokenizer_config.json").write_text(json.dumps(settings))
    size, largest = sizes(source)
    return f"llama, {size / 2e9:.2f} billion parameters", size, largest


def make_smollm2(source: str) -> tuple[str, int, int]:
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    example: Any = import_module("smollm2")
    example.make(source)
    return "SmolLM2-135M", *sizes(source)


def convert(way: str, folder: str, target: str) -> dict[str, float]:
    """Quantize all layers to 4 bits. On an NVIDIA GPU, the resident set lacks the arrays."""
    from mlx_modswap import lm

    # `mlx_lm.convert` is the function or the module, depending on what was imported before.
    theirs: Any = import_module("mlx_lm.convert").convert
    mx.reset_peak_memory()
    start = perf_counter()
    if way == "ours":
        lm.convert(f"{folder}/source", target, {"**": 4})
    else:
        with redirect_stdout(sys.stderr):  # stdout holds the result of this process
            theirs(f"{folder}/source", target, quantize=True, q_bits=4)
    mx.synchronize()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": perf_counter() - start,
        "peak": mx.get_peak_memory(),
        "resident": resident if sys.platform == "darwin" else 1024 * resident,
        "written": sum(file.stat().st_size for file in Path(target).glob("*.safetensors")),
    }


def digests(folder: str) -> dict[str, tuple[str, list[int], str]]:
    """The dtype, the shape and a hash of the values of each array."""
    return {
        name: (str(array.dtype), array.shape, blake2b(memoryview(array.view(mx.uint8))).hexdigest())
        for name, array in arrays(folder)
    }


def sizes(folder: str) -> tuple[int, int]:
    """The bytes of all arrays, and of the largest one."""
    found = [array.nbytes for _, array in arrays(folder)]
    return sum(found), max(found)


def arrays(folder: str) -> Iterator[tuple[str, Any]]:
    for file in sorted(Path(folder).glob("*.safetensors")):
        loaded: Any = mx.load(str(file))
        while loaded:  # an array that was read is not kept
            yield loaded.popitem()


TABLES = {
    "Conversion": {
        "SmolLM2": partial(compare, "make_smollm2"),
        **{f"{size} billion": partial(compare, "make_random", size) for size in (0.26, 1.1)},
    }
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion")
    parser.add_argument("billions", nargs="?", type=float, default=0.2, help="default: 0.2")
    parser.add_argument("--rounds", type=int, default=2, help="of both ways (default: 2)")
    parser.add_argument("--folder", help="where to write (default: the folder for temporary files)")
    options = parser.parse_args()
    made = "make_random", options.billions
    rows = compare(*made, rounds=options.rounds, root=options.folder)
    print(f"{versions('mlx-lm')}\n\n{markdown(rows)}")
