"""``mlx_modswap tree`` and ``mlx_modswap convert``, run as a user types them.

``data/command_line.txt`` is a table of argument lines with all that they print. They are run in
this process, one after the other, in a folder with the models that ``folders.py`` makes. After a
change of words ``python tests/cli/test_command_line.py`` writes the table again, for you to read.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import folders
import hub
import mlx.core as mx
import mlx.nn as nn
import pytest
import zoo

from mlx_modswap import tree
from mlx_modswap.__main__ import main

TABLE = Path(__file__).parents[1] / "data" / "command_line.txt"


# ---------------------------------------------------------------- the models


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder of models."""
    folder = tmp_path_factory.mktemp("models")
    folders.make_models(folder)
    return folder


# ---------------------------------------------------------------- the table


def rows() -> list[tuple[str, str]]:
    """Each command of the table, and what is below it."""
    text = re.sub(r"(?m)^# .*\n", "", TABLE.read_text("utf-8"))
    blocks = [block.partition("\n") for block in re.split(r"(?m)^\$ ", text)[1:]]
    return [(command, f"{printed.rstrip()}\n") for command, _, printed in blocks]


@pytest.mark.parametrize(("command", "expected"), rows())
def test_what_is_printed(command, expected, models, monkeypatch):
    monkeypatch.chdir(models)
    before = set(models.iterdir())
    printed = run_here(command)
    assert printed == expected or fits(printed, expected)
    _, action, _, folder, *_ = *shlex.split(command), ""
    made = action == "convert" and "[exit" not in printed and "--dry-run" not in command
    assert {path.name for path in set(models.iterdir()) - before} == ({folder} if made else set())


def run_here(command: str) -> str:
    """All that a command prints, and its exit status if that is not 0."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = main(shlex.split(command)[1:])
    return printed.getvalue() + (f"[exit status {status}]\n" if status else "")


def fits(printed: str, expected: str) -> bool:
    """Whether a text is as expected, where ``...`` is what Python, MLX or mlx-lm says."""
    return re.fullmatch(re.escape(expected).replace(r"\.\.\.", ".+"), printed) is not None


def write_table() -> None:
    """Run the commands of the table again, and write what they print now."""
    text, expected = TABLE.read_text("utf-8"), dict(rows())
    blocks = []
    with tempfile.TemporaryDirectory() as folder:
        folders.make_models(Path(folder))
        os.chdir(folder)
        for line in text.splitlines():
            if line.startswith("$ "):
                printed, old = run_here(line[2:]), expected[line[2:]]
                blocks.append(f"{line}\n{old if fits(printed, old) else printed}")
            elif line.startswith("# "):
                blocks.append(f"{line}\n")
        os.chdir(TABLE.parent)
    TABLE.write_text("\n".join(blocks), "utf-8")


# ---------------------------------------------------------------- the model that is drawn


@pytest.mark.parametrize("name", ["llama", "by_mlx_lm", "quantized", "mxfp4", "own_code"])
def test_what_is_drawn_is_what_mlx_lm_loads(name, models):
    from mlx_lm.utils import load_model

    loaded, _ = load_model(models / name, trust_remote_code=True)
    command = f"mlx_modswap tree {models / name} --trust-remote-code"
    assert run_here(command) == f"{tree(loaded)}\n"


def test_what_was_converted_is_drawn_as_the_rules_say(models, tmp_path):
    from mlx_lm import load

    folder = tmp_path / "mixed"
    assert run_here(f"mlx_modswap convert {models / 'llama'} {folder} **.q_proj=keep **=6")
    model, *_ = load(str(folder))
    bits = {path.rpartition(".")[2]: getattr(layer, "bits", 16) for path, layer in leaves(model)}
    sixes = ("embed_tokens", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert bits == {"q_proj": 16, **dict.fromkeys(sixes, 6)}
    assert run_here(f"mlx_modswap tree {folder}") == f"{tree(model)}\n"


def leaves(model: nn.Module) -> list[tuple[str, Any]]:
    return [
        (path, layer)
        for path, layer in model.named_modules()
        if hasattr(layer, "to_quantized") or hasattr(layer, "bits")
    ]


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_every_architecture_is_drawn_without_weights(name, tmp_path):
    if "stub" in zoo.ZOO[name]:
        pytest.skip("it needs a package that is not installed")
    config = {key: value for key, value in zoo.ZOO[name]["config"].items() if "dtype" not in key}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run_here(f"mlx_modswap tree {tmp_path}") == (
        f"{tree(zoo.build(name))}\n"
        "drawn from config.json alone, without weights: bits are not known\n"
    )


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, "float32"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "float16"),
        ({"dtype": None, "torch_dtype": "torch.float16"}, "float16"),
        ({"text_config": {"dtype": "float16"}}, "float16"),
        ({"text_config": {"torch_dtype": "float16"}}, "float16"),
        ({"text_config": "dtype"}, "float32"),
        ({"dtype": "auto", "text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": "bfloat16", "text_config": {"dtype": "float16"}}, "bfloat16"),
        ({"dtype": "array"}, "float32"),
    ],
)
def test_without_weights_the_dtype_is_that_of_the_config(tmp_path, config, dtype):
    bare = {key: value for key, value in folders.LLAMA.items() if key != "torch_dtype"}
    (tmp_path / "config.json").write_text(json.dumps({**bare, **config}))
    first_line = run_here(f"mlx_modswap tree {tmp_path}").splitlines()[0]
    assert first_line.endswith(f" {dtype}")


def test_weights_are_not_read(tmp_path):
    from mlx_lm.models import llama

    config = {
        **folders.LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 20,
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    nbytes = folders.write_hole(tmp_path / "model.safetensors", model)
    (tmp_path / "config.json").write_text(json.dumps(config))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    assert nbytes > 10e9
    assert "10.1 GB" in run_here(f"mlx_modswap tree {tmp_path}")
    planned = run_here(f"mlx_modswap convert {tmp_path} {tmp_path / 'new'} **=4 --dry-run")
    assert planned.endswith("new: 2.8 GB, 4.50 bits per weight; nothing was written\n")
    assert mx.get_peak_memory() - before < 2**20


def test_without_weights_nothing_is_computed(tmp_path):
    config = {**folders.LLAMA, "hidden_size": 2**13, "intermediate_size": 2**15}
    (tmp_path / "config.json").write_text(json.dumps(config))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    assert "2.0B params" in run_here(f"mlx_modswap tree {tmp_path}").splitlines()[0]
    assert mx.get_peak_memory() - before < 2**20


def test_files_of_weights_are_as_large_as_asked_for(tmp_path):
    folders.write(tmp_path / "large", {"vocab_size": 20_000})  # 2.6 MB in the embedding
    rules = "**.embed_tokens=keep **=4"
    run_here(f"mlx_modswap convert {tmp_path}/large {tmp_path}/new --max-shard-mb 1 {rules}")
    assert len(list((tmp_path / "new").glob("model*.safetensors"))) == 2


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["--hel"], "the following arguments are required: command"),
        (["draw", "llama"], "invalid choice: 'draw'"),
        (["tree"], "the following arguments are required: MODEL"),
        (["tree", "llama", "**", "more", "yet"], "unrecognized arguments: more yet"),
        (["tree", "llama", "--exclude", "a", "**", "more"], "unrecognized arguments: more"),
        (["tree", "llama", "**", "--exclude", "a", "more"], "unrecognized arguments: more"),
        (["tree", "llama", "--json"], "unrecognized arguments: --json"),
        (["convert", "llama"], "the following arguments are required: FOLDER"),
        (["convert", "llama", "new", "**=4", "--quick"], "unrecognized arguments: --quick"),
        (["convert", "llama", "new", "**=4", "--dry"], "unrecognized arguments: --dry"),
        (["convert", "llama", "new", "--q-mode", "int4"], "invalid choice: 'int4'"),
        (["convert", "llama", "new", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["convert", "llama", "new", "--q-group-size", "0"], "'0' is not a whole number above 0"),
        (["convert", "llama", "new", "--max-shard-mb", "-1"], "'-1' is not a whole number above 0"),
        (["convert", "llama", "new", "--max-shard-mb", "all"], "'all' is not a whole number"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_rules_and_options_come_in_any_order(models, monkeypatch):
    monkeypatch.chdir(models)
    printed = {
        run_here(f"mlx_modswap convert {line} --dry-run")
        for line in (
            "llama new **.q_proj=keep **=4 --dtype float32 --q-group-size 32",
            "llama new --dtype float32 --q-group-size 32 **.q_proj=keep **=4",
            "--dtype float32 llama new **.q_proj=keep --q-group-size 32 **=4",
            "llama --q-group-size 32 new --dtype float32 **.q_proj=keep **=4",
        )
    }
    assert len(printed) == 1
    assert "new: " in printed.pop()


def test_the_pattern_of_tree_may_come_after_an_option(models, monkeypatch):
    monkeypatch.chdir(models)
    printed = run_here("mlx_modswap tree llama **.q_proj --exclude model.layers[0]")
    assert printed.endswith("'**.q_proj' with exclude selects 1 of 29 modules\n")
    assert run_here("mlx_modswap tree llama --exclude model.layers[0] **.q_proj") == printed
    assert run_here("mlx_modswap tree --exclude model.layers[0] llama **.q_proj") == printed


def test_several_files_of_rules_are_read_in_their_order(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("first.json").write_text('{"**.q_proj": 8}')
    Path("second.json").write_text('{"**": 4}')
    convert = f"mlx_modswap convert {models / 'llama'} new --dry-run"
    printed = run_here(f"{convert} --rules first.json --rules second.json")
    assert printed == run_here(f"{convert} **.q_proj=8 **=4")
    assert run_here(f"{convert} --rules second.json --rules second.json") == (
        "mlx_modswap: two rules for '**': keep one of them\n[exit status 2]\n"
    )


OF_BOTH = [
    "MODEL a folder, or the id of a model on the hub",
    "--trust-remote-code run the Python file that a model may come with",
    "MODEL is a folder, or the id of a model on the Hugging Face hub, as for mlx_lm.load. "
    "A PATTERN is matched with the whole path of a module; put it in quotes. "
    "Exit status: 0, 1 if what was asked for cannot be done, 2 if the arguments are wrong.",
]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["--help"],
            [
                "usage: mlx_modswap {tree,convert} ...",
                "Draw a language model, or quantize it by rules into a folder that mlx-lm loads.",
                "tree draw the model that mlx_lm.load would build",
                "convert quantize a model by rules into a new folder",
                "mlx_modswap tree my_model '**.self_attn.{q,v}_proj'",
                "mlx_modswap convert my_model my_model_4bit '**.embed_tokens=8' '**=4'",
            ],
        ),
        (
            ["tree", "--help"],
            [
                "usage: mlx_modswap tree [-h]",
                "Draw the model that mlx_lm.load would build.",
                "PATTERN what to mark",
                "--exclude PATTERN what not to mark",
                *OF_BOTH,
            ],
        ),
        (
            ["convert", "--help"],
            [
                "usage: mlx_modswap convert [-h]",
                "Quantize a model by rules into a new folder.",
                "FOLDER must not exist yet",
                "PATTERN=BITS the first pattern that matches a layer decides; PATTERN=keep leaves "
                "layers alone",
                "--rules FILE.json more rules, after those above: {PATTERN: VALUE}, or [[PATTERN "
                "or PATTERNS, VALUE], ...]; can be given several times; a VALUE is a number of "
                'bits, {"bits": 4, "group_size": 32}, or null to leave alone',
                "--q-group-size N weights that share a scale",
                "--q-mode {affine,mxfp4,nvfp4,mxfp8} default: affine",
                "--dtype {float16,bfloat16,float32} of the unquantized rest; default: config's",
                "--max-shard-mb N size of a file; default: 1000",
                "--dry-run print the plan and write nothing",
                *OF_BOTH,
            ],
        ),
    ],
)
def test_the_help_says_what_can_be_given(arguments, parts, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    printed = capsys.readouterr().out
    words = " ".join(printed.split())
    assert [part for part in parts if part not in words] == []
    assert "put it in quotes.\n\nExit status" in printed or arguments == ["--help"]


def test_without_mlx_lm_one_line_says_what_to_install(monkeypatch, capsys):
    for name in [
        name for name in sys.modules if re.match(r"mlx_modswap\.(lm|_cli\.preview)", name)
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    for arguments in (["tree", "anywhere"], ["convert", "anywhere", "new", "**=4"]):
        assert main(arguments) == 1
        assert capsys.readouterr() == (
            "",
            "mlx_modswap: mlx_modswap.lm needs mlx-lm 0.32.1 or newer: "
            "pip install 'mlx-modswap[lm]' (import of mlx_lm halted; None in sys.modules)\n",
        )


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise RuntimeError('no\\nluck')", "mlx-lm cannot load '{folder}': no luck"),
        (
            "import no_such",
            "mlx-lm cannot load '{folder}': ModuleNotFoundError: No module named 'no_such'",
        ),
        ("raise KeyboardInterrupt", "interrupted"),
    ],
)
def test_what_the_code_of_a_model_raises_is_one_line(code, message, tmp_path):
    folder = tmp_path / "model"
    folders.write(folder, {"model_file": "own.py"})
    (folder / "own.py").write_text(code)
    for command in (f"tree {folder}", f"convert {folder} {tmp_path / 'new'} **=4"):
        assert run_here(f"mlx_modswap {command} --trust-remote-code") == (
            f"mlx_modswap: {message.replace('{folder}', str(folder))}\n[exit status 1]\n"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_code_of_a_model_without_weights_is_run_if_it_may_be(models, tmp_path):
    folder = tmp_path / "model"
    folders.write(folder, {"model_file": "own.py"}, with_weights=False)
    (folder / "own.py").write_text("from mlx_lm.models.llama import Model, ModelArgs")

    assert run_here(f"mlx_modswap tree {folder} --trust-remote-code") == run_here(
        f"mlx_modswap tree {models / 'config'}"
    )


def test_a_config_that_mlx_lm_cannot_build_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "none"}')

    assert run_here(f"mlx_modswap tree {tmp_path}") == (
        f"mlx_modswap: mlx-lm cannot build a model from '{tmp_path}': Model type none not "
        "supported.\n[exit status 1]\n"
    )


# ---------------------------------------------------------------- processes of their own


ENVIRONMENT = {
    **os.environ,
    # Not the source folder, if Python is new enough to be told so (3.11).
    "PYTHONPATH": os.pathsep.join(sys.path),
    "PYTHONSAFEPATH": "1",
}


def run(*arguments: str | Path, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "mlx_modswap", *arguments],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, **environment},
    )
    return done.returncode, done.stdout, done.stderr


def test_it_runs_as_a_module(models):
    message = "'norm' matches nothing; '**.norm' matches 1"
    assert run("tree", models / "llama", "norm") == (2, "", f"mlx_modswap: {message}\n")


def test_it_runs_as_a_script(models):
    script = Path(sys.executable).parent / "mlx_modswap"
    if not script.exists():
        pytest.skip("the package is not installed with its script")
    command = [script, "tree", models / "llama"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run_here(f"mlx_modswap tree {models / 'llama'}")


def test_a_reader_that_has_seen_enough_is_no_error(models):
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_modswap", "tree", models / "llama"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # before there is anything to read
    assert (process.stderr.read(), process.wait()) == (b"", 0)
    process.stderr.close()


@pytest.mark.parametrize(
    ("is_full", "told"),
    [(False, ""), (True, "mlx_modswap: cannot print: No space left on device\n")],
)
def test_what_could_not_be_printed_is_not_written_again_when_the_output_closes(
    is_full, told, models, capsys
):
    if is_full and not os.path.exists("/dev/full"):
        pytest.skip("there is no full device to write to")
    reader, writer = os.pipe()
    os.close(reader)
    # Python closes its output, too, when it exits; an error there would fail the test.
    with (
        open(writer, "w") as pipe,
        open("/dev/full", "w") if is_full else pipe as output,
        contextlib.redirect_stdout(output),
    ):
        status = main(["tree", str(models / "llama")])
    assert (status, capsys.readouterr().err) == (is_full, told)


# Sends a signal to its process when the unfinished folder is loaded.
ENDING = """
import os, signal
from pathlib import Path
from mlx_lm.models.llama import Model, ModelArgs

if Path(__file__).parent.parent.name.startswith(".new-"):
    os.kill(os.getpid(), signal.{name})
"""


@pytest.fixture
def ending(tmp_path, request) -> str:
    """The command that converts a model whose code sends a signal."""
    folders.write(tmp_path / "model", {"model_file": "own.py"})
    (tmp_path / "model" / "own.py").write_text(ENDING.format(name=request.param))
    return f"convert {tmp_path / 'model'} {tmp_path / 'new'} **=4 --trust-remote-code"


def run_with(handler: Any, name: str, command: str) -> str:
    """Run a command that starts with a handler of a signal, such as ``SIG_IGN`` under nohup."""
    before = signal.signal(signal.Signals[name], handler)
    try:
        return run_here(f"mlx_modswap {command}")
    finally:
        signal.signal(signal.Signals[name], before)


INTERRUPTED = "mlx_modswap: interrupted\n"


@pytest.mark.parametrize("ending", ["SIGINT", "SIGTERM", "SIGHUP"], indirect=True)
def test_a_conversion_that_is_ended_by_a_signal_leaves_nothing(ending, tmp_path, request):
    name = request.node.callspec.params["ending"]
    usual = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    assert run_with(usual, name, ending) == f"{INTERRUPTED}[exit status 1]\n"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("ending", ["SIGTERM"], indirect=True)
def test_a_process_that_is_ended_by_a_signal_leaves_nothing(ending, tmp_path):
    assert run(*ending.split()) == (1, "", INTERRUPTED)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("ending", ["SIGHUP"], indirect=True)
def test_a_signal_that_is_ignored_does_not_end_a_conversion(ending, tmp_path):
    assert "[exit status" not in run_with(signal.SIG_IGN, "SIGHUP", ending)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new"]


def test_the_handlers_of_signals_are_the_same_afterwards_and_other_threads_work(models):
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)]
    with ThreadPoolExecutor(1) as pool:
        printed = pool.submit(run_here, f"mlx_modswap tree {models / 'llama'}").result()
    assert printed == run_here(f"mlx_modswap tree {models / 'llama'}")
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)] == before


# ---------------------------------------------------------------- models of the hub


def test_a_model_in_the_cache_of_the_hub_is_drawn_like_a_folder(models, hub_cache):
    snapshot = hub.snapshot(hub_cache, "whole")
    for file in ("config.json", "model.safetensors"):
        (snapshot / file).symlink_to(models / "llama" / file)
    expected = run_here(f"mlx_modswap tree {models / 'llama'}")
    assert run_here("mlx_modswap tree some/whole") == expected


def test_a_model_of_the_hub_without_weights_here_is_drawn_from_its_config(models, hub_cache):
    snapshot = hub.snapshot(hub_cache, "config")
    (snapshot / "config.json").symlink_to(models / "llama" / "config.json")
    expected = run_here(f"mlx_modswap tree {models / 'config'}")
    assert expected.endswith("bits are not known\n")
    assert run_here("mlx_modswap tree some/config") == expected


def test_only_the_config_of_a_model_on_the_hub_is_fetched(models, hub_cache, monkeypatch):
    from huggingface_hub import constants

    file = "/some/model/resolve/main/config.json"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with hub.serving({file: (models / "config" / "config.json").read_bytes()}) as (url, asked):
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        printed = run_here("mlx_modswap tree some/model")

    assert printed == run_here(f"mlx_modswap tree {models / 'config'}")
    assert [one for one in asked if "/some/model" in one] == [f"HEAD {file}", f"GET {file}"]


def test_a_model_of_the_hub_that_cannot_be_had_is_one_line(hub_cache):
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with pytest.raises(LocalEntryNotFoundError) as caught:
        hf_hub_download("some/other", "config.json")
    told = " ".join(str(caught.value).split())

    assert run_here("mlx_modswap tree some/other") == (
        "mlx_modswap: there is no folder 'some/other', and the hub does not have the config.json "
        f"of a model of that name: {told}\n[exit status 1]\n"
    )


if __name__ == "__main__":
    write_table()
