"""Every record of the zoo of mlx-vlm is a model that mlx-vlm builds, saves, loads and runs."""

from __future__ import annotations

import json
from collections.abc import Callable

import mlx.core as mx
import pytest

pytest.importorskip("mlx_vlm", reason="the zoo is made of classes of mlx-vlm")

import vision_zoo
import zoo
from mlx_vlm import utils
from vision_zoo import Arrays

pytestmark = pytest.mark.usefixtures("on_the_cpu")

RECORDS = vision_zoo.records()
WITH_TEXT = [record for record in RECORDS if record["inputs"] is not None]
MOST_PARAMETERS = 2_500_000


def head_from_the_embedding(arrays: Arrays) -> Arrays:
    """It looks for the head under another name, finds none, and puts the embedding there."""
    embedding = arrays["language_model.model.embed_tokens.weight"]
    return {**arrays, "language_model.lm_head.weight": embedding}


def in_half_precision(arrays: Arrays) -> Arrays:
    """Arrays in float32 are cast."""
    return {
        name: array.astype(mx.float16) if array.dtype == mx.float32 else array
        for name, array in arrays.items()
    }


# What `sanitize` computes on every load, so that the loaded model is not the one that was saved.
COMPUTED: dict[str, Callable[[Arrays], Arrays]] = {
    "gemma3": head_from_the_embedding,
    "molmo_point": in_half_precision,
}


def test_each_architecture_has_one_record_in_the_order_of_the_alphabet():
    names = [record["arch"] for record in RECORDS]
    assert names == sorted(set(names))
    assert set(COMPUTED) <= set(names)


def test_a_record_says_how_its_model_runs_or_why_it_does_not():
    for record in RECORDS:
        assert set(record) == {"arch", "config", "inputs"} | (
            {"why"} if record["inputs"] is None else set()
        )
        assert record["inputs"] in ("tokens", "language_model", None)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["arch"])
def test_a_folder_of_the_zoo_is_loaded_bit_by_bit(tmp_path, record):
    model = vision_zoo.build(record)
    saved = vision_zoo.arrays_of(model)
    expected = COMPUTED.get(record["arch"], dict)(saved)

    folder = vision_zoo.write(record, model, tmp_path / "model")
    loaded = vision_zoo.arrays_of(utils.load_model(folder))

    config = json.loads((folder / "config.json").read_text())
    assert config == vision_zoo.record(record["arch"])["config"]
    assert type(model).__module__.split(".")[2] == record["arch"]
    assert sum(array.size for array in saved.values()) <= MOST_PARAMETERS
    assert list(loaded) == list(expected)
    assert [name for name in loaded if not zoo.same(loaded[name], expected[name])] == []


@pytest.mark.parametrize("record", WITH_TEXT, ids=lambda record: record["arch"])
def test_a_model_of_the_zoo_runs_on_a_text_alone(record):
    output = vision_zoo.outputs(vision_zoo.build(record), record)

    assert mx.isfinite(output).all()
    assert output.min() != output.max()
    assert zoo.same(output, vision_zoo.outputs(vision_zoo.build(record), record))


@pytest.mark.parametrize("arch", ["dinov2", "muse_spark"])
def test_a_model_that_takes_no_text_alone_says_why(arch):
    record = vision_zoo.record(arch)
    with pytest.raises(ValueError, match="takes no text alone") as caught:
        vision_zoo.outputs(vision_zoo.build(record), record)
    assert str(caught.value) == f"{arch} takes no text alone: {record['why']}"
