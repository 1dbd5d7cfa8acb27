"""Convert a vision-language model: ``lm.convert`` and ``mlx_vlm.convert``; a sweep over the zoo.

python -m benchmarks.vision                  # a model of about 400 MB
python -m benchmarks.vision --blocks 23      # one of about 1 GB
python -m benchmarks.vision --sweep          # all architectures of tests/data/mlx_vlm_zoo.json

A processor is loaded and saved by ``mlx_vlm.convert`` only. The model has none, so for both ways
the time is that of reading, quantizing and writing.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from shutil import rmtree
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import mlx.core as mx

from .conversion import digests, sizes
from .tables import Row, markdown, mb, verdict, versions
from .timing import alone, ratio

WAYS = ("ours", "mlx-vlm")


def compare(blocks: int, rounds: int) -> list[Row]:
    """Convert a model in both ways, alternately, each time in a new process."""
    with TemporaryDirectory() as folder:
        size, largest = alone("vision", "make", f"{folder}/source", blocks)
        found: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in WAYS}
        arrays: dict[str, Any] = {}
        for index in range(rounds):
            for way in WAYS[:: (-1) ** index]:  # the other way goes first in the next round
                target = f"{folder}/converted"
                for name, figure in alone("vision", "convert", way, folder, target).items():
                    found[way][name].append(figure)
                if way not in arrays:
                    arrays[way] = alone("vision", "hashes", target)
                rmtree(target)
    assert arrays["ours"] == arrays["mlx-vlm"], "the arrays differ"
    ours, theirs = found["ours"], found["mlx-vlm"]
    peak, peaks = max(ours["peak"]), [mb(max(found[way]["peak"])) for way in WAYS]
    slower = ratio(ours["seconds"], theirs["seconds"])
    return [
        {
            "model": f"Qwen2-VL, {blocks} blocks",
            "weights": mb(size),
            "largest array": mb(largest),
            "peak, ours / mlx-vlm": " / ".join(peaks),
            "mlx-vlm / ours": f"**{max(theirs['peak']) / peak:.1f}**",
            "time, ours / mlx-vlm": f"**{slower:.2f}**",
            "seconds": " / ".join(f"{median(found[way]['seconds']):.1f}" for way in WAYS),
            "equal arrays": f"{len(arrays['ours']):,} of {len(arrays['mlx-vlm']):,}",
            "goal": "half the peak, 1.1 x the time",
            "verdict": verdict(2 * peak <= max(theirs["peak"]) and slower <= 1.1),
        }
    ]


# ---------------------------------------------------------------- called in a new process


def make(source: str, blocks: int) -> tuple[int, int]:
    """Write a Qwen2-VL with random weights."""
    example = _example()
    example.CONFIG.update(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32_000,
        rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]},
        torch_dtype="bfloat16",
    )
    tower = {"depth": 8, "embed_dim": 512, "hidden_size": 1024, "num_heads": 8, "mlp_ratio": 4}
    example.CONFIG["vision_config"].update(tower)
    example.make(Path(source), mx.bfloat16)
    return sizes(source)


def convert(way: str, folder: str, target: str) -> dict[str, float]:
    """Quantize all layers outside the tower to 4 bits."""
    from mlx_modswap import lm

    # `mlx_vlm.convert` is the function or the module, depending on what was imported before.
    theirs: Any = import_module("mlx_vlm.convert")
    utils: Any = import_module("mlx_vlm.utils")

    def without_processor(folder: Path, lazy: bool, **keywords: Any) -> tuple[Any, Any, Any]:
        return utils.load_model(folder, lazy), utils.load_config(folder), object()

    theirs.fetch_from_hub = without_processor
    theirs.create_model_card = lambda *arguments: None
    mx.reset_peak_memory()
    start = perf_counter()
    if way == "ours":
        lm.convert(f"{folder}/source", target, {"**": 4}, loader="mlx-vlm")
    else:
        with redirect_stdout(sys.stderr):  # stdout holds the result of this process
            theirs.convert(f"{folder}/source", target, quantize=True, q_bits=4)
    mx.synchronize()
    return {"seconds": perf_counter() - start, "peak": mx.get_peak_memory()}


def hashes(folder: str) -> Any:
    return digests(folder)


def _example() -> Any:
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    return import_module("vision")


# ---------------------------------------------------------------- the zoo


def sweep() -> list[Row]:
    """Save, convert, compare and adapt the architectures of the zoo, and count how many work."""
    tests = Path(__file__).parent.parent / "tests"
    sys.path[:0] = [str(tests), str(tests / "lm")]
    zoo: Any = import_module("vision_zoo")
    steps: Any = import_module("vision_sweep")
    counts: Counter[str] = Counter()
    failed: dict[str, list[str]] = defaultdict(list)
    for record in zoo.records():
        print(record["arch"], file=sys.stderr)
        with TemporaryDirectory() as folder:
            for name, works in steps.results(record, Path(folder)):
                counts[f"{name}, of"] += 1
                if works:
                    counts[name] += 1
                else:
                    failed[name].append(record["arch"])
    names = [name for name in counts if not name.endswith(", of")]
    return [
        {
            "step": name,
            "architectures": f"{counts[name]} of {counts[f'{name}, of']}",
            "not": ", ".join(failed[name]),
        }
        for name in names
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vision")
    parser.add_argument("--blocks", type=int, default=7, help="default: 7, about 400 MB")
    parser.add_argument("--rounds", type=int, default=3, help="of both ways (default: 3)")
    parser.add_argument("--sweep", action="store_true", help="count what works in the zoo")
    options = parser.parse_args()
    rows = sweep() if options.sweep else compare(options.blocks, options.rounds)
    print(f"{versions('mlx-lm', 'mlx-vlm')}\n\n{markdown(rows)}")
