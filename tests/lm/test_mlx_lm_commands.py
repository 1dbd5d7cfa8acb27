"""What ``lm`` writes is read by the commands of mlx-lm, and by an older mlx-lm."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import model_folders
import pytest

from mlx_modswap import lm

pytestmark = pytest.mark.usefixtures("on_the_cpu")

PROMPT = "w3 w5 w7"
WORDS = 12

# Layers of one's own: rules that the model file applies where the model is built.
OWN = """
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.models.llama import ModelArgs
from mlx_modswap import replace_layers


class Doubled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __call__(self, x):
        return 2 * self.layer(x)


RULES = {"model.layers[1:3].self_attn.o_proj": lambda path, layer: Doubled(layer)}


class Model(llama.Model):
    def __init__(self, args):
        super().__init__(args)
        replace_layers(self, RULES)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model of a few kilobytes, with a tokenizer."""
    where = tmp_path_factory.mktemp("models")
    with mx.stream(mx.cpu):
        source = model_folders.add_tokenizer(model_folders.llama_folder(where / "source"))
        lm.convert(source, where / "mixed", {"**.{q,v}_proj": 8, "**": 4}, dtype="float32")
    return where / "mixed"


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    """The same model with layers of a ``model_file``."""
    (tmp_path / "doubled.py").write_text(OWN)
    names: dict[str, Any] = {"__name__": "doubled"}
    exec(OWN, names)
    model = mlx_lm.load(str(folder))[0]
    names["replace_layers"](model, names["RULES"])
    config = {"model_file": str(tmp_path / "doubled.py")}
    lm.save(model, tmp_path / "own", folder, config=config, trust_remote_code=True)
    return tmp_path / "own"


def generated(folder: Path, **keywords: Any) -> str:
    """What the model says in this process."""
    model, tokenizer = mlx_lm.load(str(folder), **keywords)[:2]
    stream = mx.default_stream(mx.cpu)
    return mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=WORDS, stream=stream)


# Every command runs on the CPU: there is one device on which a text is the same for all of them.
ON_THE_CPU = """
import runpy, sys
import mlx.core as mx
mx.set_default_device(mx.cpu)
sys.argv = ["mlx_lm", *sys.argv[1:]]
runpy.run_module("mlx_lm", run_name="__main__")
"""


def mlx_lm_command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", ON_THE_CPU, *arguments]


def generated_by_command(folder: Path, *arguments: str) -> str:
    command = mlx_lm_command(
        *("generate", "--model", str(folder), "--prompt", PROMPT, "--max-tokens", str(WORDS)),
        *("--verbose", "False", *arguments),
    )
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=offline())
    return run.stdout.removesuffix("\n")


def offline() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def test_the_generate_command_says_what_the_model_says_here(folder):
    said = generated(folder)

    assert said
    assert generated_by_command(folder) == said


def test_a_model_file_gives_the_same_here_and_in_the_generate_command(folder, own_folder):
    said = generated(own_folder, trust_remote_code=True)

    assert said != generated(folder)
    assert generated_by_command(own_folder, "--trust-remote-code") == said


def test_the_server_answers_a_request_with_what_the_model_says_here(folder, tmp_path):
    with served(folder, tmp_path / "log") as port:
        body = {"model": str(folder), "prompt": PROMPT, "max_tokens": WORDS, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with direct().open(request, timeout=60) as answer:
            text = json.load(answer)["choices"][0]["text"]

    assert text.split() == generated(folder).split()


def direct() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextmanager
def served(folder: Path, log: Path) -> Iterator[int]:
    """Run ``mlx_lm.server`` on a free port of this machine alone, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = mlx_lm_command(
        *("server", "--model", str(folder), "--host", "127.0.0.1", "--port", str(port))
    )
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=offline())
        try:
            wait_for(port, server, log)
            yield port
        finally:
            server.terminate()
            server.wait(timeout=60)


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        try:
            with direct().open(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the server does not answer: {log.read_text()}")


# An older mlx-lm

READ = """
import json, sys
import mlx.core as mx
mx.set_default_device(mx.cpu)
import mlx_lm
model, tokenizer = mlx_lm.load(sys.argv[1])
layers = {path: [layer.bits, layer.group_size, layer.mode]
          for path, layer in model.named_modules() if "scales" in layer}
said = mlx_lm.generate(model, tokenizer, sys.argv[2], max_tokens=int(sys.argv[3]))
print(json.dumps([mlx_lm.__version__, layers, said]))
"""


@pytest.mark.skipif(
    "OLD_MLX_LM" not in os.environ,
    reason="OLD_MLX_LM does not name the Python of an environment with mlx-lm 0.31.3",
)
@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_the_oldest_mlx_lm_that_is_supported_loads_what_is_written(folder, tmp_path, mode):
    source = folder.parent / "source"
    rules = {"**.{q,v}_proj": {"bits": 8, "mode": "affine"}, "**": {"mode": mode}}
    lm.convert(source, tmp_path / "mixed", rules, dtype="float32", max_shard_mb=0.02)
    command = [os.environ["OLD_MLX_LM"], "-c", READ, str(tmp_path / "mixed"), PROMPT, str(WORDS)]
    clean = {key: value for key, value in offline().items() if key != "PYTHONPATH"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=clean)
    version, layers, said = json.loads(run.stdout.splitlines()[-1])
    model = mlx_lm.load(str(tmp_path / "mixed"))[0]

    assert version == "0.31.3"
    assert layers == {
        path: [layer.bits, layer.group_size, layer.mode]
        for path, layer in model.named_modules()
        if "scales" in layer
    }
    assert said == generated(tmp_path / "mixed")
