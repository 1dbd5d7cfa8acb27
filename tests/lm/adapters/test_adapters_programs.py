"""mlx-lm's programs, in processes of their own, use an adapter folder that was saved here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import model_folders
import pytest
from adapting import lora

from mlx_modswap import lm, replace_layers

PROMPT, COUNT = "w12 w34 w56", 12


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = model_folders.llama_folder(tmp_path_factory.mktemp("model"))
    return model_folders.add_tokenizer(folder)


@pytest.fixture(scope="module")
def adapter_folder(model_folder, tmp_path_factory) -> Path:
    """Adapters of two ranks and three scales, at places that no keys of a block can name."""
    folder = tmp_path_factory.mktemp("adapters")
    model, _ = load(model_folder)
    model.freeze()
    mx.random.seed(1)
    rules = {
        "model.layers[0].self_attn.{q,v}_proj": lora(8, 30.0),
        "model.layers[2].mlp.*_proj": lora(3, 20.0),
        "lm_head": lora(8, 25.0),
    }
    replace_layers(model, rules)
    lm.save_adapters(model, folder)
    return folder


def load(folder: Path, **options: Any) -> tuple[Any, Any]:
    model, tokenizer, *_ = mlx_lm.load(str(folder), **options)
    return model, tokenizer


@pytest.fixture(scope="module")
def answers(model_folder, adapter_folder) -> tuple[str, str]:
    """What the model says with and without the adapters, all in this process."""
    model, tokenizer = load(model_folder)
    without = mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=COUNT)
    replace_layers(model, lm.adapter_rules(adapter_folder))
    return mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=COUNT), without


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """That of a user without a network, on the device of the tests."""
    folder = tmp_path_factory.mktemp("device")
    name = "cpu" if mx.default_device() == mx.cpu else "gpu"
    device = f"import mlx.core as mx; mx.set_default_device(mx.{name})\n"
    (folder / "sitecustomize.py").write_text(device)
    path = os.pathsep.join([str(folder), *sys.path])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def mlx_lm_program(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "mlx_lm", *map(str, args)]


def test_the_adapters_change_what_the_model_says(answers):
    with_adapters, without = answers

    assert len(with_adapters) >= COUNT
    assert with_adapters != without


def test_mlx_lm_load_gives_the_same_answer(model_folder, adapter_folder, answers):
    model, tokenizer = load(model_folder, adapter_path=str(adapter_folder))

    assert mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=COUNT) == answers[0]


def test_mlx_lm_generate_gives_the_same_answer(model_folder, adapter_folder, answers, environment):
    command = mlx_lm_program(
        *("generate", "--model", model_folder, "--adapter-path", adapter_folder),
        *("--prompt", PROMPT, "--max-tokens", str(COUNT), "--temp", "0", "--verbose", "False"),
    )
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answers[0].strip()


def test_mlx_lm_fuse_makes_a_model_with_the_same_output(
    model_folder, adapter_folder, environment, tmp_path
):
    command = mlx_lm_program(
        *("fuse", "--model", model_folder, "--adapter-path", adapter_folder),
        *("--save-path", tmp_path / "fused"),
    )
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    fused, _ = load(tmp_path / "fused")
    model, _ = load(model_folder)
    tokens = mx.array([[12, 34, 56]])
    without = model(tokens)
    replace_layers(model, lm.adapter_rules(adapter_folder))
    assert mx.allclose(fused(tokens), model(tokens), rtol=2e-2, atol=2e-2)
    assert not mx.allclose(without, model(tokens), rtol=2e-2, atol=2e-2)


@pytest.fixture
def server(model_folder, adapter_folder, environment, tmp_path) -> Iterator[str]:
    """The address of ``mlx_lm.server`` on this machine's loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = mlx_lm_program(
        *("server", "--model", model_folder, "--adapter-path", adapter_folder),
        *("--host", "127.0.0.1", "--port", str(port)),
    )
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            wait_until_ready(address, process, tmp_path / "log")
            yield address
        finally:
            process.terminate()


def wait_until_ready(address: str, process: subprocess.Popen[Any], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{address}/health", timeout=10).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the server did not start: {log.read_text()}")


def test_mlx_lm_server_gives_the_same_answer(server, answers):
    body = {"prompt": PROMPT, "max_tokens": COUNT, "temperature": 0}
    request = urllib.request.Request(
        f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        (choice,) = json.load(response)["choices"]

    assert choice["text"].strip() == answers[0].strip()
