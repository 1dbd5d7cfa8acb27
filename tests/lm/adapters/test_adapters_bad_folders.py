"""Bad adapter folders: one clear error that names the file or the place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import hub
import mlx.core as mx
import pytest
from adapting import arrays_of, config_of, contents, frozen, is_expected, lora, message
from hypothesis import given
from hypothesis import strategies as st

from mlx_modswap import NoMatchError, lm, replace_layers, swapped

pytestmark = pytest.mark.usefixtures("on_the_cpu")

Q1, Q3 = (f"model.layers.{n}.self_attn.q_proj" for n in (1, 3))


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with two adapters of ranks 2 and 4."""
    model = frozen("llama")
    replace_layers(model, {Q1: lora(2, 3.0), Q3: lora(4, 5.0)})
    lm.save_adapters(model, tmp_path / "math")
    return tmp_path / "math"


def rewrite(folder: Path, **entries: Any) -> None:
    """Change entries of the config."""
    config = {**config_of(folder), **entries}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def set_parameter(folder: Path, name: str, value: Any) -> None:
    rewrite(folder, lora_parameters={**config_of(folder)["lora_parameters"], name: value})


def set_truth(folder: Path, path: str, **entries: Any) -> None:
    truths = config_of(folder)["mlx_modswap"]
    rewrite(folder, mlx_modswap={**truths, path: {**truths.get(path, {}), **entries}})


def set_array(folder: Path, name: str, array: mx.array | None) -> None:
    arrays = {key: mx.array(value) for key, value in arrays_of(folder).items()}
    mx.eval(arrays)
    if array is None:
        del arrays[name]
    else:
        arrays[name] = array
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (
        lambda folder: shutil.rmtree(folder),
        "FileNotFoundError: 'math' is not a folder here, and the hub does not have an adapter of "
        "that name: ...",
    ),
    "a file": (
        lambda folder: (shutil.rmtree(folder), folder.write_text("")),
        "NotADirectoryError: 'math' is a file, not a folder",
    ),
    "no config": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        "FileNotFoundError: 'math/adapter_config.json' does not exist; an adapter is a folder with "
        "adapter_config.json, and with adapters.safetensors (mlx-lm) or adapter_model.safetensors "
        "(PEFT)",
    ),
    "no weights": (
        lambda folder: (folder / "adapters.safetensors").unlink(),
        "FileNotFoundError: 'math/adapters.safetensors' does not exist; an adapter is a folder "
        "with adapter_config.json, and with adapters.safetensors (mlx-lm) or "
        "adapter_model.safetensors (PEFT)",
    ),
    "a config that is not JSON": (
        lambda folder: (folder / "adapter_config.json").write_text('{"fine_tune_type": lora}'),
        "ValueError: 'math/adapter_config.json' is not JSON: Expecting value: line 1 column 20 "
        "(char 19)",
    ),
    "a config that is no text": (
        lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff\xfe{}"),
        "ValueError: 'math/adapter_config.json' is not JSON: 'utf-8' codec can't decode byte 0xff "
        "in position 0: invalid start byte",
    ),
    "a config that is a list": (
        lambda folder: (folder / "adapter_config.json").write_text("[1, 2]"),
        "ValueError: 'math/adapter_config.json' must be a JSON object, not [1, 2]",
    ),
    "a truncated file": (
        lambda folder: cut(folder / "adapters.safetensors", 1000),
        "ValueError: 'math/adapters.safetensors' is broken: [...",  # as MLX's texts begin
    ),
    "a file cut in its header": (
        lambda folder: cut(folder / "adapters.safetensors", 100),
        "ValueError: 'math/adapters.safetensors' is broken: ...",
    ),
    "an empty file": (
        lambda folder: cut(folder / "adapters.safetensors", 0),
        "ValueError: 'math/adapters.safetensors' is broken: ...",
    ),
    "another kind of file": (
        lambda folder: (folder / "adapters.safetensors").write_text("GGUF" * 100),
        "ValueError: 'math/adapters.safetensors' is broken: ...",
    ),
    "no arrays": (
        lambda folder: mx.save_safetensors(str(folder / "adapters.safetensors"), {}),
        "ValueError: 'math/adapters.safetensors' has no arrays",
    ),
    "a full fine-tune": (
        lambda folder: rewrite(folder, fine_tune_type="full"),
        "ValueError: 'math' is a full fine-tune, not an adapter: its arrays take the place of the "
        "model's; mlx_lm.load(..., adapter_path=...) loads it",
    ),
    "an unknown type": (
        lambda folder: rewrite(folder, fine_tune_type="ia3"),
        "ValueError: 'fine_tune_type' in 'math/adapter_config.json' must be 'lora' or 'dora', not "
        "'ia3'",
    ),
    "no parameters": (
        lambda folder: rewrite(folder, lora_parameters=None),
        "ValueError: 'lora_parameters' in 'math/adapter_config.json' must be a JSON object, not "
        "null",
    ),
    "no scale": (
        lambda folder: set_parameter(folder, "scale", None),
        "ValueError: 'scale' in 'math/adapter_config.json' must be a finite number, not null",
    ),
    "an infinite scale": (
        lambda folder: set_parameter(folder, "scale", float("inf")),
        "ValueError: 'scale' in 'math/adapter_config.json' must be a finite number, not Infinity",
    ),
    "a scale of 400 digits": (
        lambda folder: set_parameter(folder, "scale", 10**400),
        "ValueError: 'scale' in 'math/adapter_config.json' must be a finite number, not "
        f"1{'0' * 56}...",
    ),
    "a rank that is no number": (
        lambda folder: set_parameter(folder, "rank", "4"),
        "ValueError: 'rank' in 'math/adapter_config.json' must be a whole number of at least 1, "
        'not "4"',
    ),
    "a rank of zero": (
        lambda folder: set_parameter(folder, "rank", 0),
        "ValueError: 'rank' in 'math/adapter_config.json' must be a whole number of at least 1, "
        "not 0",
    ),
    "another rank than the arrays": (
        lambda folder: set_parameter(folder, "rank", 8),
        "ValueError: 'math/adapters.safetensors' has lora_a of shape (64, 4) and lora_b of shape "
        f"(4, 64) for '{Q1}', which are not of rank 8, as adapter_config.json says",
    ),
    "a dropout that is a text of 60 characters": (
        lambda folder: set_parameter(folder, "dropout", 58 * "x"),
        "ValueError: 'dropout' in 'math/adapter_config.json' must be a finite number, not "
        f'"{58 * "x"}"',
    ),
    "a dropout that is a longer text": (
        lambda folder: set_parameter(folder, "dropout", 59 * "x"),
        f"ValueError: 'dropout' in 'math/adapter_config.json' must be a finite number, not "
        f'"{56 * "x"}...',
    ),
    "a dropout of one": (
        lambda folder: set_parameter(folder, "dropout", 1.0),
        "ValueError: 'dropout' in 'math/adapter_config.json' must be at least 0 and less than 1, "
        "not 1.0",
    ),
    "no lora_b": (
        lambda folder: set_array(folder, f"{Q3}.lora_b", None),
        f"ValueError: 'math/adapters.safetensors' has lora_a for '{Q3}', and LoRA needs lora_a, "
        "lora_b",
    ),
    "DoRA's m in LoRA": (
        lambda folder: set_array(folder, f"{Q3}.m", mx.ones(64)),
        f"ValueError: 'math/adapters.safetensors' has lora_a, lora_b, m for '{Q3}', and LoRA needs "
        "lora_a, lora_b",
    ),
    "DoRA without m": (
        lambda folder: rewrite(folder, fine_tune_type="dora"),
        f"ValueError: 'math/adapters.safetensors' has lora_a, lora_b for '{Q1}', and DoRA needs "
        "lora_a, lora_b, m",
    ),
    "an array of the model": (
        lambda folder: set_array(folder, "model.norm.weight", mx.ones(64)),
        "ValueError: 'math/adapters.safetensors' has an array 'model.norm.weight', which is not "
        "one of an adapter (lora_a, lora_b or m)",
    ),
    "a name with an empty segment": (
        lambda folder: set_array(folder, "../../model.lora_a", mx.ones((64, 4))),
        "ValueError: 'math/adapters.safetensors' has an array '../../model.lora_a', which is not "
        "the name of a parameter",
    ),
    "arrays with one axis": (
        lambda folder: set_array(folder, f"{Q1}.lora_a", mx.ones(4)),
        "ValueError: 'math/adapters.safetensors' has lora_a of shape (4,) and lora_b of shape "
        f"(4, 64) for '{Q1}', which are not of rank 4, as adapter_config.json says",
    ),
    "arrays of one dimension": (
        lambda folder: [set_array(folder, f"{Q1}.lora_{x}", mx.zeros(4)) for x in "ab"],
        f"ValueError: 'math/adapters.safetensors' has lora_a of shape (4,) and lora_b of shape "
        f"(4,) for '{Q1}', which are not of rank 4, as adapter_config.json says",
    ),
    "arrays of integers": (
        lambda folder: set_array(folder, f"{Q1}.lora_a", mx.ones((64, 4), mx.int32)),
        f"ValueError: 'math/adapters.safetensors' has '{Q1}.lora_a' as mlx.core.int32, which is "
        "not a float",
    ),
    "true ranks that are a list": (
        lambda folder: rewrite(folder, mlx_modswap=[4, 2]),
        "ValueError: 'mlx_modswap' in 'math/adapter_config.json' must be a JSON object, not [4, 2]",
    ),
    "a true rank for another path": (
        lambda folder: set_truth(folder, "model.layers.9.self_attn.q_proj", rank=2, scale=1.0),
        "ValueError: 'mlx_modswap' in 'math/adapter_config.json' and the arrays have different "
        "paths: 'model.layers.9.self_attn.q_proj'",
    ),
    "a truth that is a number": (
        lambda folder: rewrite(folder, mlx_modswap={**config_of(folder)["mlx_modswap"], Q1: 3}),
        f"ValueError: '{Q1}' under 'mlx_modswap' in 'math/adapter_config.json' must be a JSON "
        "object, not 3",
    ),
    "a true rank that is not a number": (
        lambda folder: set_truth(folder, Q1, rank="2"),
        f"ValueError: 'rank' of '{Q1}' under 'mlx_modswap' in 'math/adapter_config.json' must be a "
        'whole number of at least 1, not "2"',
    ),
    "a true scale that is not a number": (
        lambda folder: set_truth(folder, Q1, scale=None),
        f"ValueError: 'scale' of '{Q1}' under 'mlx_modswap' in 'math/adapter_config.json' must be "
        "a finite number, not null",
    ),
    "a true rank that is too high": (
        lambda folder: set_truth(folder, Q1, rank=5),
        f"ValueError: 'rank' of '{Q1}' under 'mlx_modswap' in 'math/adapter_config.json' is 5, but "
        "the arrays have the rank 4",
    ),
    "a true rank that is too low": (
        lambda folder: set_truth(folder, Q3, rank=3),
        f"ValueError: 'rank' of '{Q3}' under 'mlx_modswap' in 'math/adapter_config.json' is 3, but "
        "lora_a is not zero beyond it",
    ),
    "a true scale of zero": (
        lambda folder: set_truth(folder, Q3, scale=0),
        f"ValueError: 'scale' of '{Q3}' under 'mlx_modswap' in 'math/adapter_config.json' cannot "
        "be 0.0 where others are 3.0",
    ),
    "a true dtype that is none": (
        lambda folder: set_truth(folder, Q3, dtype="int4"),
        f"ValueError: 'dtype' of '{Q3}' under 'mlx_modswap' in 'math/adapter_config.json' must be "
        "'float16' or 'bfloat16'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_one_clear_error(name, saved):
    damage, expected = BAD[name]
    damage(saved)
    text = message(lambda: lm.adapter_rules(str(saved)), saved)

    assert is_expected(text, expected), text


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, Callable[[bytes], bytes]]:
    """A file of the folder, and how some of its bytes are lost, replaced or added."""
    name = draw(st.sampled_from(["adapter_config.json", "adapters.safetensors"]))
    start, length = draw(st.integers(0, 1000)), draw(st.sampled_from([0, 1, 2, 8, 100, 10000]))
    new = draw(st.one_of(st.binary(max_size=8), st.text('{}[]":,.-0123456789e ').map(str.encode)))
    return name, lambda data: data[:start] + new + data[start + length :]


@given(st.lists(damages(), min_size=1, max_size=3))
def test_a_damaged_folder_is_refused_in_words_or_read_as_it_is(tmp_path_factory, some):
    model, folder = frozen("llama"), tmp_path_factory.mktemp("math")
    replace_layers(model, {Q1: lora(2, 3.0), Q3: lora(4, 5.0)})
    lm.save_adapters(model, folder)
    for name, damage in some:
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
    fresh = frozen("llama")
    before = contents(fresh)
    with suppress(ValueError, NoMatchError), swapped(fresh, lm.adapter_rules(folder)) as news:
        assert news
    assert contents(fresh)[0] == before[0]


def test_a_hub_id_that_cannot_be_had_is_one_clear_error(tmp_path, hub_cache):
    text = message(lambda: lm.adapter_rules("some/math"), tmp_path)

    assert is_expected(
        text,
        "FileNotFoundError: 'some/math' is not a folder here, and the hub does not have an "
        "adapter of that name: Cannot find an appropriate cached snapshot folder ...",
    ), text


def test_a_hub_id_in_the_cache_is_read_from_there(saved, hub_cache):
    shutil.copytree(saved, hub.snapshot(hub_cache, "math"), dirs_exist_ok=True)

    assert list(lm.adapter_rules("some/math")) == [Q1, Q3]
