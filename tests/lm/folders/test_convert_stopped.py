"""``lm.convert`` that is stopped on the way, or cannot begin: nothing is left, and one error."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import hub
import huggingface_hub
import mlx.core as mx
import model_folders
import pytest
from model_folders import load

from mlx_modswap import NoMatchError, PatternError, lm

pytestmark = pytest.mark.usefixtures("on_the_cpu")

# Stopped on the way
#
# The second file is larger than the process may write, which is an error (see `small_files_only`),
# or a signal that kills or interrupts the process.

STOPPED = """
import resource, signal, sys
import mlx.core as mx
from mlx_modswap import lm

def interrupt(signal, frame):
    raise KeyboardInterrupt

mx.set_default_device(mx.cpu)
signal.signal(signal.SIGXFSZ, {"kill": signal.SIG_DFL, "interrupt": interrupt}[sys.argv[3]])
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
rules = {"model.embed_tokens": 2, "**": 8}
lm.convert(sys.argv[1], sys.argv[2], rules, max_shard_mb=0.001)
"""


def stopped(source: Path, target: Path, how: str) -> subprocess.CompletedProcess[str]:
    # Everything is smaller than 30 kB but the layers of the MLP.
    return subprocess.run(
        [sys.executable, "-c", STOPPED, str(source), str(target), how],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def wide_source(tmp_path: Path) -> Path:
    return model_folders.llama_folder(tmp_path / "source", intermediate_size=1024)


def test_a_run_that_is_killed_between_two_shards_leaves_nothing_under_the_final_name(
    tmp_path, wide_source
):
    run = stopped(wide_source, tmp_path / "converted", "kill")
    rest = [path for path in tmp_path.iterdir() if path != wide_source]

    assert run.returncode == -signal.SIGXFSZ
    assert [path.name.startswith(".converted-") for path in rest] == [True]
    assert list(rest[0].rglob("model-00001-of-*.safetensors"))
    assert not list(rest[0].rglob("*.index.json"))

    lm.convert(wide_source, tmp_path / "converted", {"**": 8})
    assert load(tmp_path / "converted")


@pytest.mark.parametrize(
    ("most", "file"),
    [(1000, r"model\.safetensors"), (0.001, r"model-0\d+-of-0\d+\.safetensors")],
)
def test_a_file_that_cannot_be_written_is_named(tmp_path, wide_source, most, file):
    before, rules = model_folders.content(tmp_path), {"model.embed_tokens": 2, "**": 8}
    with (
        model_folders.small_files_only(),
        pytest.raises(OSError, match="could not be written") as caught,
    ):
        lm.convert(wide_source, tmp_path / "converted", rules, max_shard_mb=most)

    assert re.fullmatch(
        rf"{file} could not be written: \[write\] Unable to write \d+ bytes to file\.",
        str(caught.value),
    )
    assert model_folders.content(tmp_path) == before


def test_a_run_that_is_interrupted_leaves_nothing(tmp_path, wide_source):
    before = model_folders.content(tmp_path)
    run = stopped(wide_source, tmp_path / "converted", "interrupt")

    assert run.returncode != 0
    assert run.stderr.splitlines()[-1] == "KeyboardInterrupt"
    assert model_folders.content(tmp_path) == before


MOVED = """
from pathlib import Path
from mlx_lm.models.llama import Model, ModelArgs

outer = Path(__file__).parent.parent
if outer.name.startswith(".converted-"):
    outer.rename(outer.with_name("elsewhere"))
    outer.symlink_to(outer.with_name("elsewhere"))
    raise ValueError("moved")
"""


def test_what_cannot_be_removed_is_named(tmp_path, source):
    (source / "moved.py").write_text(MOVED)
    config = {**model_folders.LLAMA, "model_file": "moved.py"}
    (source / "config.json").write_text(json.dumps(config))
    with (
        pytest.warns(match="holds an unfinished model and could not be removed") as warned,
        pytest.raises(ValueError, match=r"moved$"),
    ):
        lm.convert(source, tmp_path / "converted", {"**": 4}, trust_remote_code=True)

    rest = {path.name for path in tmp_path.iterdir()} - {"source", "elsewhere"}
    assert len(rest) == 1
    assert str(warned[0].message).startswith(repr(str(tmp_path / rest.pop())))


# Bad input


def truncated(source: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def of_another_kind(source: Path) -> None:
    (source / "model.safetensors").write_bytes(b"PK" * 100)


def with_arrays(source: Path, **changes: mx.array | None) -> None:
    file = str(source / "model.safetensors")
    arrays: Any = mx.load(file)
    mx.eval(arrays)
    for name, array in changes.items():
        arrays.pop(name.replace("__", "."), None)
        if array is not None:
            arrays[name.replace("__", ".")] = array
    mx.save_safetensors(file, arrays)


def with_an_array_more(source: Path) -> None:
    with_arrays(source, model__norm__bias=mx.zeros((64,)))


def with_an_array_less(source: Path) -> None:
    with_arrays(source, model__norm__weight=None)


def with_another_shape(source: Path) -> None:
    with_arrays(source, model__norm__weight=mx.zeros((65,)))


def without_weights(source: Path) -> None:
    (source / "model.safetensors").unlink()


def with_code(source: Path) -> None:
    config = {**model_folders.LLAMA, "model_file": "own.py"}
    (source / "config.json").write_text(json.dumps(config))


def with_an_unknown_type(source: Path) -> None:
    config = {**model_folders.LLAMA, "model_type": "paligemma"}
    (source / "config.json").write_text(json.dumps(config))


def with_broken_json(source: Path) -> None:
    (source / "config.json").write_text("{")


def without_config(source: Path) -> None:
    (source / "config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            truncated,
            ValueError,
            "'{source}/model.safetensors' is broken: {mlx}",
        ),
        (
            of_another_kind,
            ValueError,
            "'{source}/model.safetensors' is broken: {mlx}",
        ),
        (
            with_an_array_more,
            ValueError,
            "mlx-lm cannot load '{source}': Received 1 parameters not in model: model.norm.bias.",
        ),
        (
            with_an_array_less,
            ValueError,
            "mlx-lm cannot load '{source}': Missing 1 parameters: model.norm.weight.",
        ),
        (
            with_another_shape,
            ValueError,
            "mlx-lm cannot load '{source}': Expected shape (64,) but received shape (65,) for "
            "parameter model.norm.weight",
        ),
        (
            without_weights,
            ValueError,
            "mlx-lm cannot load '{source}': model.safetensors is missing, which "
            "model.safetensors.index.json names",
        ),
        (
            with_code,
            ValueError,
            "the config names a model_file, 'own.py', whose code builds the model; pass "
            "trust_remote_code=True (--trust-remote-code) if you trust it",
        ),
        (
            with_an_unknown_type,
            ValueError,
            "mlx-lm cannot load '{source}': Model type paligemma not supported.",
        ),
        (
            with_broken_json,
            ValueError,
            "'{source}/config.json' is not JSON: Expecting property name enclosed in double "
            "quotes: line 1 column 2 (char 1)",
        ),
        (without_config, FileNotFoundError, "there is no config.json in '{source}'"),
    ],
)
def test_a_source_that_is_broken_is_named(tmp_path, source, spoil, error, message):
    spoil(source)
    before = model_folders.content(tmp_path)
    with pytest.raises(error) as caught:
        lm.convert(source, tmp_path / "converted", {"**": 4})

    if "{mlx}" in message:
        with pytest.raises(RuntimeError) as of_mlx:
            mx.load(str(source / "model.safetensors"))
        message = message.replace("{mlx}", str(of_mlx.value))
    assert str(caught.value) == message.replace("{source}", str(source))
    assert model_folders.content(tmp_path) == before


def test_a_source_that_neither_the_disk_nor_the_hub_has_is_named(tmp_path):
    with pytest.raises(huggingface_hub.errors.HFValidationError) as of_the_hub:
        huggingface_hub.snapshot_download("no/such/model")
    with pytest.raises(FileNotFoundError) as caught:
        lm.convert("no/such/model", tmp_path / "converted", {"**": 4})

    assert str(caught.value) == (
        "'no/such/model' is not a folder here, and the hub does not have a model of "
        f"that name: {of_the_hub.value}"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_name_on_the_hub_that_is_not_in_the_cache_is_an_error_of_one_line(tmp_path, hub_cache):
    with pytest.raises(FileNotFoundError) as caught:
        lm.convert("no-such/model", tmp_path / "converted", {"**": 4})

    assert str(caught.value).startswith(
        "'no-such/model' is not a folder here, and the hub does not have a model of that name: "
    )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "converted").exists()


def test_a_model_in_the_cache_of_the_hub_is_converted_and_saved(tmp_path, hub_cache):
    source = model_folders.llama_folder(hub.snapshot(hub_cache, "model"))
    lm.convert("some/model", tmp_path / "converted", {"**": 4})
    lm.save(load(tmp_path / "converted"), tmp_path / "saved", "some/model")
    lm.convert(source, tmp_path / "here", {"**": 4})

    for name in ("converted", "saved"):
        model_folders.assert_same_arrays(load(tmp_path / name), load(tmp_path / "here"))


@pytest.mark.parametrize(
    ("rules", "keywords", "error", "message"),
    [
        (
            {"**": 4},
            {"dtype": "int8"},
            ValueError,
            "dtype must be one of 'float16', 'bfloat16', 'float32', not 'int8'",
        ),
        (
            {"**": 4},
            {"max_shard_mb": 0},
            ValueError,
            "max_shard_mb must be a number above 0, not 0",
        ),
        (
            {"**": 4},
            {"max_shard_mb": "5"},
            ValueError,
            "max_shard_mb must be a number above 0, not '5'",
        ),
        (
            {"**": 4},
            {"mode": "int4"},
            ValueError,
            "mode must be 'affine', 'mxfp4', 'nvfp4' or 'mxfp8', not 'int4'",
        ),
        (
            {"**.down_proj": 4},
            {},
            ValueError,
            "rule '**.down_proj' asks for groups of 64, which do not divide the width of "
            "model.layers[0:4].mlp.down_proj (96); use a group_size (--q-group-size) of 32, or "
            "leave these layers alone with None (keep)",
        ),
    ],
)
def test_a_wrong_argument_writes_nothing(tmp_path, source, rules, keywords, error, message):
    before = model_folders.content(tmp_path)
    with pytest.raises(error) as caught:
        lm.convert(source, tmp_path / "converted", rules, **keywords)

    assert str(caught.value) == message
    assert model_folders.content(tmp_path) == before


@pytest.mark.parametrize(
    ("rules", "error"), [({"**.w1": 4}, NoMatchError), ({"layers.[0]": 4}, PatternError)]
)
def test_errors_of_patterns_come_through_and_write_nothing(tmp_path, source, rules, error):
    before = model_folders.content(tmp_path)
    with pytest.raises(error):
        lm.convert(source, tmp_path / "converted", rules)

    assert model_folders.content(tmp_path) == before


def test_a_target_that_exists_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "converted").mkdir()
    with pytest.raises(FileExistsError) as caught:
        lm.convert("no/such/model", tmp_path / "converted", {"**": 4})

    assert str(caught.value) == (f"'{tmp_path}/converted' exists already; use a new folder name")


HUGE = """
import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.models.llama import ModelArgs

class Model(llama.Model):
    def __init__(self, args):
        super().__init__(args)
        self.table = mx.zeros((2**22, 2**22))  # never computed

    def sanitize(self, weights):
        return {**super().sanitize(weights), "table": self.table}
"""


def test_a_model_that_is_larger_than_the_disk_is_refused_before_the_first_byte(tmp_path, source):
    (source / "huge.py").write_text(HUGE)
    config = {**model_folders.LLAMA, "model_file": "huge.py"}
    (source / "config.json").write_text(json.dumps(config))
    before = model_folders.content(tmp_path)
    with pytest.raises(OSError, match=r"needs 70\.4 TB, and its disk has .+ left; nothing"):
        lm.convert(source, tmp_path / "converted", {"**": 4}, trust_remote_code=True)

    assert model_folders.content(tmp_path) == before

    (source / "notes.txt").touch()
    os.truncate(source / "notes.txt", 2**40)  # it takes no space, but its copy would
    with pytest.raises(OSError, match=r"needs 71\.5 TB"):
        lm.convert(source, tmp_path / "converted", {"**": 4}, trust_remote_code=True)


TRUNCATING = """
import os
from mlx_lm.models import llama
from mlx_lm.models.llama import ModelArgs

class Model(llama.Model):
    def sanitize(self, weights):
        os.truncate({weights!r}, 100)
        return super().sanitize(weights)
"""


def test_weights_that_are_cut_off_while_they_are_read_are_named(tmp_path, source):
    (source / "own.py").write_text(TRUNCATING.format(weights=str(source / "model.safetensors")))
    (source / "config.json").write_text(json.dumps({**model_folders.LLAMA, "model_file": "own.py"}))
    with pytest.raises(ValueError, match="cannot be computed") as caught:
        lm.convert(source, tmp_path / "converted", {"**": 4}, trust_remote_code=True)

    reading = str(caught.value.__cause__)
    assert reading.startswith("[read] Unable to read")
    assert str(caught.value) == f"'model.embed_tokens.weight' cannot be computed: {reading}"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_model_that_would_be_loaded_with_other_dtypes_is_refused(tmp_path, source):
    (source / "own.py").write_text(model_folders.CASTING)
    config = {**model_folders.LLAMA, "model_file": "own.py", "torch_dtype": "float16"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="was not written") as caught:
        lm.convert(source, tmp_path / "converted", {"**": 4}, trust_remote_code=True)

    assert str(caught.value) == (
        f"'{tmp_path}/converted' was not written: mlx-lm would build float32 (64,) at "
        "model.norm.weight, but the model has float16 (64,)"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
