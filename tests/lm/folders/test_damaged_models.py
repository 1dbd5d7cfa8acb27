"""Damaged folders of models: one clear error, and the model and the disk are as before.

A thousand folders and more:

    pytest --hypothesis-profile nightly tests/lm/folders/test_damaged_models.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import model_folders
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from mlx_lm.utils import load_model

from mlx_modswap import lm
from mlx_modswap.lm import _source

pytestmark = pytest.mark.usefixtures("on_the_cpu")

Damage = Callable[[Path], None]
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
JSON = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 8),
    st.floats(-2, 2),
    st.sampled_from(["", "llama", "../llama", "../model.safetensors", "os", "\N{SNOWMAN}"]),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(
        st.sampled_from(["bits", "group_size", "mode", "x"]), st.integers(), max_size=2
    ),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two files of weights, an index and a tokenizer."""
    where = tmp_path_factory.mktemp("models")
    with mx.stream(mx.cpu):
        source = model_folders.add_tokenizer(model_folders.llama_folder(where / "source"))
        lm.convert(source, where / "whole", {"**.q_proj": 8}, max_shard_mb=0.2)
    files = {file.name for file in (where / "whole").iterdir()}
    assert {CONFIG, INDEX, SHARD} <= files, files
    return where / "whole"


def bytes_lost(name: str, start: int, length: int, new: bytes) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:start] + new + data[start + length :])

    return damage


def cut_off(name: str, part: float) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(part * len(data))])

    return damage


def missing(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def folder_instead(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def entry(key: str, value: Any) -> Damage:
    """An entry of the config with another value."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_bytes())
        (folder / CONFIG).write_text(json.dumps({**config, key: value}))

    return damage


def array(number: int, new: mx.array | None, name: str) -> Damage:
    """An array that is missing, another one, or has another name."""

    def damage(folder: Path) -> None:
        arrays: Any = mx.load(str(folder / SHARD))
        mx.eval(arrays)
        key = list(arrays)[number % len(arrays)]
        old = arrays.pop(key)
        if new is not None or name:
            arrays[name or key] = old if new is None else new
        mx.save_safetensors(str(folder / SHARD), arrays)

    return damage


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    name = draw(st.sampled_from([CONFIG, INDEX, SHARD, "tokenizer.json", "tokenizer_config.json"]))
    kind = draw(st.sampled_from(["bytes", "cut", "missing", "folder", "entry", "array"]))
    if kind == "bytes":
        start = draw(st.one_of(st.integers(0, 20), st.integers(0, 4000)))
        length = draw(st.sampled_from([0, 1, 2, 8, 100, 10_000]))
        text = st.text('{}[]":,.-0123456789e ', max_size=4)
        return bytes_lost(name, start, length, draw(st.binary(max_size=8) | text.map(str.encode)))
    if kind == "cut":
        return cut_off(name, draw(st.floats(0, 0.999)))
    if kind == "missing":
        return missing(name)
    if kind == "folder":
        return folder_instead(name)
    if kind == "entry":
        keys = [*model_folders.LLAMA, "quantization", "rope_theta", "text_config", "model_file"]
        return entry(draw(st.sampled_from(keys)), draw(JSON))
    shape = draw(st.lists(st.integers(0, 65), max_size=3))
    other = draw(st.sampled_from([None, mx.float16, mx.uint32, mx.bool_]))
    new = None if other is None else mx.zeros(shape, other)
    return array(draw(st.integers(0, 99)), new, draw(st.sampled_from(["", "../x", "x", "a.b.c"])))


def damaged(factory: pytest.TempPathFactory, whole: Path, damages: list[Damage]) -> Path:
    """A copy of a folder after some damages, in a folder of its own."""
    folder = factory.mktemp("damaged") / "source"
    shutil.copytree(whole, folder)
    for damage in damages:
        try:
            damage(folder)
        except (OSError, ValueError, RuntimeError):  # an earlier one left nothing to damage
            assume(False)
    assume(blocks_of(folder) < 20)  # thousands of blocks take long to build
    return folder


def blocks_of(folder: Path) -> float:
    try:
        blocks = json.loads((folder / CONFIG).read_bytes())["num_hidden_layers"]
        return float(blocks)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return 0


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n   lines"), "two lines"),
        (OSError("no space"), "no space"),
        (KeyError("bits"), "KeyError: 'bits'"),
        (ValueError(), "ValueError: "),
        (RuntimeError(400 * "x"), 400 * "x"),
        (RuntimeError(401 * "x"), 400 * "x" + "..."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_an_error_says_is_one_line(error, line):
    assert _source.one_line(error) == line


def assert_one_line(error: Exception) -> None:
    text = str(error)
    assert text
    assert "\n" not in text
    assert len(text) < 1000


@example(some=[entry("text_config", True)])
@given(st.lists(damages(), min_size=1, max_size=3))
def test_a_damaged_model_is_refused_in_one_line_or_converted_as_it_is(
    tmp_path_factory, whole, some
):
    folder = damaged(tmp_path_factory, whole, some)
    before = model_folders.content(folder.parent)
    try:
        lm.convert(folder, folder.parent / "converted", {"**.v_proj": 4}, strict=False)
    except (ValueError, OSError, LookupError) as error:
        assert_one_line(error)
        assert model_folders.content(folder.parent) == before
    else:
        load_model(folder.parent / "converted", lazy=True)
        after = model_folders.content(folder.parent)
        assert {name: after[name] for name in before} == before


@given(st.lists(damages(), min_size=1, max_size=3))
def test_a_model_is_saved_from_a_damaged_source_or_refused_in_one_line(
    tmp_path_factory, whole, some
):
    folder = damaged(tmp_path_factory, whole, some)
    model, _ = load_model(whole)
    arrays = model_folders.arrays_of(model)
    before = model_folders.content(folder.parent)
    try:
        lm.save(model, folder.parent / "saved", folder)
    except (ValueError, OSError) as error:
        assert_one_line(error)
        assert model_folders.content(folder.parent) == before
    else:
        again, _ = load_model(folder.parent / "saved")
        model_folders.assert_same_arrays(again, model)
    after = model_folders.arrays_of(model)
    assert list(after) == list(arrays)
    assert all(after[name] is arrays[name] for name in arrays)
