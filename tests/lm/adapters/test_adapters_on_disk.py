"""An adapter folder is written all at once, or not at all."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import pytest
from adapting import adapters_in, arrays_of, config_of, frozen, identical, lora
from mlx_lm.tuner.utils import load_adapters

from mlx_modswap import lm, replace_layers

pytestmark = pytest.mark.usefixtures("on_the_cpu")

Q = "model.layers.*.self_attn.q_proj"
FILES = ["adapter_config.json", "adapters.safetensors"]


def llama_with(rank: int) -> nn.Module:
    model = frozen("llama")
    replace_layers(model, Q, lora(rank))
    return model


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


# Python tells this hook of every rename, and an error of the hook is an error of the rename.
_on_rename: list[Callable[[], None]] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event == "os.rename":
        for action in _on_rename:
            action()


sys.addaudithook(_hook)


@contextmanager
def at_every_rename(action: Callable[[], None]) -> Iterator[None]:
    _on_rename.append(action)
    try:
        yield
    finally:
        _on_rename.remove(action)


# ---------------------------------------------------------------- where it is written


def test_missing_folders_are_made(tmp_path):
    lm.save_adapters(llama_with(4), tmp_path / "one" / "two")

    assert sorted(files(tmp_path)) == [f"one/two/{name}" for name in FILES]


def test_an_adapter_without_a_type_is_lora_and_without_a_dropout_has_none(tmp_path):
    model, fresh = llama_with(2), frozen("llama")
    lm.save_adapters(model, tmp_path)
    config = config_of(tmp_path)
    del config["fine_tune_type"], config["lora_parameters"]["dropout"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    news = replace_layers(fresh, lm.adapter_rules(tmp_path))

    assert {type(layer).__name__ for layer in news.values()} == {"LoRALinear"}
    assert {cast(Any, layer).dropout._p_1 for layer in news.values()} == {1.0}


def test_adapters_are_saved_and_read_if_all_of_their_scales_are_zero(tmp_path):
    model, fresh = frozen("llama"), frozen("llama")
    replace_layers(model, Q, lora(2, 0.0))
    lm.save_adapters(model, tmp_path)
    news = replace_layers(fresh, lm.adapter_rules(tmp_path))

    assert [layer.scale for layer in news.values()] == [0.0] * 4


def test_the_folder_may_be_given_as_text(tmp_path):
    lm.save_adapters(llama_with(4), str(tmp_path / "math"))

    assert sorted(files(tmp_path / "math")) == FILES


def test_the_files_of_an_existing_folder_are_replaced_and_its_other_files_stay(tmp_path):
    lm.save_adapters(llama_with(4), tmp_path)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "0000100_adapters.safetensors").write_text("a checkpoint")
    lm.save_adapters(llama_with(8), tmp_path)

    assert set(files(tmp_path)) == {*FILES, "README.md", "0000100_adapters.safetensors"}
    model = load_adapters(frozen("llama"), str(tmp_path))
    assert {adapter.lora_a.shape for adapter in adapters_in(model).values()} == {(64, 8)}


def test_the_files_can_be_read_by_everyone_who_may_read_new_files(tmp_path):
    lm.save_adapters(llama_with(4), tmp_path / "math")
    (tmp_path / "new.txt").write_text("")
    (tmp_path / "new").mkdir()

    def mode(path: Path) -> int:
        return path.stat().st_mode

    assert mode(tmp_path / "math") == mode(tmp_path / "new")
    for name in FILES:
        assert mode(tmp_path / "math" / name) == mode(tmp_path / "new.txt")


def test_adapters_that_mlx_lm_has_not_read_yet_are_saved_to_their_own_file(tmp_path):
    lm.save_adapters(llama_with(4), tmp_path)
    before = arrays_of(tmp_path)
    mx.eval(before)
    model = load_adapters(frozen("llama"), str(tmp_path))  # reads the header of the file
    lm.save_adapters(model, tmp_path)
    after = arrays_of(tmp_path)

    assert after.keys() == before.keys()
    assert all(identical(after[name], before[name]) for name in before)


def test_rules_do_not_change_with_the_file_that_they_were_read_from(tmp_path):
    model = llama_with(4)
    lm.save_adapters(model, tmp_path)
    config = config_of(tmp_path)
    del config["mlx_modswap"]  # as mlx_lm.lora writes it
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    rules = lm.adapter_rules(tmp_path)
    for name in FILES:
        (tmp_path / name).write_bytes(b"something else")
    news: Any = replace_layers(frozen("llama"), rules)

    for path, adapter in adapters_in(model).items():
        assert identical(news[path].lora_b, adapter.lora_b)


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_of_peft_is_not_overwritten(weights, tmp_path):
    (tmp_path / weights).write_bytes(b"weights")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    before = files(tmp_path)
    with pytest.raises(ValueError, match="PEFT") as caught:
        lm.save_adapters(llama_with(4), tmp_path)

    assert str(caught.value) == (
        f"{str(tmp_path)!r} has an adapter of PEFT, which would be lost; use another folder"
    )
    assert files(tmp_path) == before


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "math").write_text("mine")
    with pytest.raises(NotADirectoryError) as caught:
        lm.save_adapters(llama_with(4), tmp_path / "math")

    assert str(caught.value) == f"{str(tmp_path / 'math')!r} is a file; pass a folder"
    assert files(tmp_path) == {"math": b"mine"}


# ---------------------------------------------------------------- when something fails


def unreadable(folder: Path) -> mx.array:
    """An array that fails when it is computed: its file was cut after its header was read."""
    file = folder / "gone.safetensors"
    mx.save_safetensors(str(file), {"lora_b": mx.ones((4, 64))})
    arrays: Any = mx.load(str(file))
    os.truncate(file, 200)
    return arrays["lora_b"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_while_writing_leaves_what_was_there(exists, tmp_path):
    target = tmp_path / "one" / "two"
    if exists:
        lm.save_adapters(llama_with(4), target)
    before = files(target)
    model = llama_with(4)
    adapters_in(model)["model.layers.0.self_attn.q_proj"].lora_b = unreadable(tmp_path)
    with pytest.raises(RuntimeError, match="read"):
        lm.save_adapters(model, target)

    assert files(target) == before
    assert target.exists() == (tmp_path / "one").exists() == exists


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, PermissionError])
def test_a_failure_at_any_rename_leaves_the_old_adapter(kind, failing, tmp_path):
    lm.save_adapters(llama_with(4), tmp_path)
    before, count = files(tmp_path), 0

    def fail() -> None:
        nonlocal count
        count += 1
        if count == failing:
            raise kind("no")

    with at_every_rename(fail), pytest.raises(kind):
        lm.save_adapters(llama_with(8), tmp_path)

    assert files(tmp_path) == before


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failure_at_any_rename_leaves_no_new_folder(failing, tmp_path):
    count = 0

    def fail() -> None:
        nonlocal count
        count += 1
        if count == failing:
            raise PermissionError("no")

    with at_every_rename(fail), pytest.raises(PermissionError):
        lm.save_adapters(llama_with(8), tmp_path / "one" / "two")

    assert list(tmp_path.iterdir()) == []


def test_a_reader_never_finds_the_config_of_one_adapter_and_the_arrays_of_another(tmp_path):
    lm.save_adapters(llama_with(4), tmp_path)
    old, seen = files(tmp_path), []

    def look() -> None:
        seen.append({name: data for name, data in files(tmp_path).items() if name in FILES})

    with at_every_rename(look):
        lm.save_adapters(llama_with(8), tmp_path)
    new = files(tmp_path)

    assert len(seen) == 4
    assert sorted(new) == FILES
    for state in seen:  # also what a process leaves that is killed
        assert state == old or "adapter_config.json" not in state
