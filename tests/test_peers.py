"""benchmarks/peers.py and examples/distill_quantized.py, from end to end on a small model."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx.utils import tree_flatten
from mlx_lm import utils
from mlx_lm.models import llama
from tokenizers import Tokenizer, models, pre_tokenizers

from mlx_modswap import lm, replace_layers, select

sys.path.append(str(Path(__file__).parent.parent))
sys.path.append(str(Path(__file__).parent.parent / "examples"))
peers: Any = importlib.import_module("benchmarks.peers")
distilling: Any = importlib.import_module("distill_quantized")

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "vocab_size": 256,
    "tie_word_embeddings": True,
}
SMALL = (
    "--length 32 --train 320 --judged 64 --docs 320 --written 4 --grid 2 --rounds 1 --passes 1 "
    "--steps 2 --batch 2"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A llama with random weights, and a tokenizer whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("llama")
    utils.save_model(folder, build())
    (folder / "config.json").write_text(json.dumps(CONFIG))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({one: at for at, one in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": alphabet[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def build() -> Any:
    mx.random.seed(0)
    return llama.Model(llama.ModelArgs.from_dict(CONFIG))


def arrays_of(model: nn.Module) -> dict[str, mx.array]:
    arrays: Any = tree_flatten(model.parameters())
    return dict(arrays)


def test_every_way_makes_a_folder_of_the_same_size_and_is_judged(folder, capsys):
    peers.main(["--model", str(folder), "--bits", "4", *SMALL.split()])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[7:]]
    assert [way for way, *_ in rows] == list(peers.WAYS)
    figures = {way: [float(cell) for cell in cells] for way, *cells in rows}
    size = figures["uniform"][0]
    for megabytes, kl, held_out, _ in figures.values():
        assert megabytes <= size
        assert 0 < kl < 0.1
        assert 0 < held_out < 0.1


def test_a_way_that_fails_leaves_the_rows_of_the_others(folder, capsys):
    ways = ["--bits", "3", "--ways", "gptq", "uniform"]
    peers.main(["--model", str(folder), *SMALL.split(), *ways])
    failed, done = capsys.readouterr().out.splitlines()[-2:]
    assert failed == "| gptq |  |  |  | AssertionError: Unsupported bits 3 |"
    assert done.startswith("| uniform | 0.0 | 0.")


class Positions:
    """A tokenizer whose tokens are the positions of the characters of a text."""

    def encode(self, text: str, verbose: bool) -> list[int]:
        return list(range(len(text)))


def test_the_parts_of_the_help_are_disjoint_and_what_is_judged_comes_last():
    parts = peers.python_help(Positions(), 10_000, 9_600, 32)
    positions = [position for part in parts for position in part.flatten().tolist()]
    assert len(positions) == len(set(positions))
    assert [part.shape for part in parts] == [(273, 32), (39, 32), (300, 32)]
    assert parts.judged.min() > max(parts.train.max(), parts.held_out.max())


# ---------------------------------------------------------------- distill_quantized.py


def put_in(teacher: Any, student: Any) -> None:
    originals = dict(teacher.named_modules())

    def rounded(path: str, layer: Any) -> nn.Module:
        embedding = isinstance(layer, nn.QuantizedEmbedding)
        kind = distilling.RoundedEmbedding if embedding else distilling.RoundedLinear
        return kind(layer, originals[path].weight)

    replace_layers(student, "**", rounded, where=distilling.is_affine)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_a_rounded_layer_starts_as_the_quantized_one_and_ends_as_it(bits, group_size):
    teacher, student = build(), build()
    lm.quantize(student, {"**": bits}, group_size=group_size)
    quantized = select(student, "**", where=distilling.is_affine)
    before = arrays_of(student)
    text = mx.arange(32)[None]
    with mx.stream(mx.cpu):  # a GPU may multiply in TF32
        expected = student(text)
        put_in(teacher, student)
        assert mx.allclose(student(text), expected, atol=1e-5)
    replace_layers(
        student,
        "**",
        lambda path, layer: layer.quantized(quantized[path]),
        where=distilling.Rounded,
    )
    after = arrays_of(student)
    assert list(after) == list(before)
    assert [name for name in before if not mx.array_equal(before[name], after[name])] == []


def test_a_layer_that_was_not_only_rounded_keeps_its_levels_at_first():
    layer: Any = build().model.embed_tokens.to_quantized(bits=4)
    other = nn.Embedding(256, 64).weight
    rounded = distilling.RoundedEmbedding(layer, other)
    assert mx.array_equal(rounded.quantized(layer).weight, layer.weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_levels_are_packed_as_mlx_unpacks_them(bits):
    mx.random.seed(0)
    levels = mx.random.randint(0, 2**bits, (4, 128)).astype(mx.uint32)
    ones, zeros = mx.ones((4, 2)), mx.zeros((4, 2))
    unpacked = mx.dequantize(distilling.packed(levels, bits), ones, zeros, group_size=64, bits=bits)
    assert mx.array_equal(unpacked, levels)


def test_training_lowers_the_loss_and_changes_only_the_quantized_layers():
    teacher, student = build(), build()
    lm.quantize(student, {"**": 3})
    before = arrays_of(student)
    text = mx.random.randint(0, 256, (8, 32))
    lost = distilling.divergence(teacher, student, text)
    distilling.distill(teacher, student, text, steps=20, batch=4, learning_rate=0.02)
    assert distilling.divergence(teacher, student, text) < 0.7 * lost
    after = arrays_of(student)
    assert {name: (array.shape, array.dtype) for name, array in after.items()} == {
        name: (array.shape, array.dtype) for name, array in before.items()
    }
    same = {name for name in after if mx.array_equal(before[name], after[name])}
    assert same == {name for name in after if "norm" in name}


def test_an_interrupted_training_leaves_the_quantized_layers(monkeypatch):
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(distilling, "train", interrupted)
    teacher, student = build(), build()
    lm.quantize(student, {"**": 3})
    before = dict(student.named_modules())
    with pytest.raises(KeyboardInterrupt):
        distilling.distill(teacher, student, mx.zeros((1, 8)), 1, 1, 0.1)
    after = dict(student.named_modules())
    assert list(after) == list(before)
    assert all(after[path] is module for path, module in before.items())


def test_a_written_sequence_starts_with_a_piece_of_the_text():
    text = mx.arange(64).reshape(2, 32)
    written = distilling.write(build(), text, 5, at_once=2)
    assert written.shape == (5, 32)
    starts = [list(range(at, at + distilling.START)) for at in range(0, 64, distilling.START)]
    assert all(row[: distilling.START] in starts for row in written.tolist())
