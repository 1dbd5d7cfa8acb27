# ruff: noqa: E501
"""``python -m mlx_modswap`` draws a model from its config, or says in one line why it does not."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from typing import Any

import mlx.core as mx
import pytest

from mlx_modswap.__main__ import main

needs_mlx_lm = pytest.mark.skipif(
    importlib.util.find_spec("mlx_lm") is None, reason="the models are those of mlx-lm"
)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 1000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
QUANTIZED = {
    **LLAMA,
    "quantization": {
        "group_size": 64,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
        "model.layers.2.mlp.down_proj": False,
    },
}


@pytest.fixture
def folder(tmp_path):
    """Makes a model folder of a config."""

    def make(config: Any) -> str:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(text)
        return str(tmp_path)

    return make


# ---------------------------------------------------------------- the picture


@needs_mlx_lm
def test_it_draws_the_model_of_a_config(folder, capsys):
    assert main([folder(LLAMA), "**.{q,v}_proj", "--exclude", "model.layers[0].**"]) == 0
    assert (
        capsys.readouterr().out
        == """\
  Model                                                                          175.0K params   350.1 KB   bfloat16
    model                                  LlamaModel                            175.0K          350.1 KB   bfloat16
      embed_tokens                         Embedding(1000, 64)                   64.0K           128.0 KB   bfloat16
      layers.0                             TransformerBlock(4 heads)             37.0K           74.0 KB    bfloat16
        self_attn                          Attention(4 heads, 2 kv heads)        12.3K           24.6 KB    bfloat16
          {q,o}_proj                       Linear(64 -> 64)                 x2   8.2K            16.4 KB    bfloat16
          {k,v}_proj                       Linear(64 -> 32)                 x2   4.1K            8.2 KB     bfloat16
          rope                             RoPE(16)
        mlp                                MLP                                   24.6K           49.2 KB    bfloat16
          {gate,up}_proj                   Linear(64 -> 128)                x2   16.4K           32.8 KB    bfloat16
          down_proj                        Linear(128 -> 64)                     8.2K            16.4 KB    bfloat16
        {input,post_attention}_layernorm   RMSNorm(64, eps=1e-05)           x2   128             256 B      bfloat16
      layers[1:3]                          TransformerBlock(4 heads)        x2   74.0K           148.0 KB   bfloat16
        self_attn                          Attention(4 heads, 2 kv heads)   x2   24.6K           49.2 KB    bfloat16
*         q_proj                           Linear(64 -> 64)                 x2   8.2K            16.4 KB    bfloat16
          k_proj                           Linear(64 -> 32)                 x2   4.1K            8.2 KB     bfloat16
*         v_proj                           Linear(64 -> 32)                 x2   4.1K            8.2 KB     bfloat16
          o_proj                           Linear(64 -> 64)                 x2   8.2K            16.4 KB    bfloat16
          rope                             RoPE(16)                         x2
        mlp                                MLP                              x2   49.2K           98.3 KB    bfloat16
          {gate,up}_proj                   Linear(64 -> 128)                x4   32.8K           65.5 KB    bfloat16
          down_proj                        Linear(128 -> 64)                x2   16.4K           32.8 KB    bfloat16
        {input,post_attention}_layernorm   RMSNorm(64, eps=1e-05)           x4   256             512 B      bfloat16
      norm                                 RMSNorm(64, eps=1e-05)                64              128 B      bfloat16
'**.{q,v}_proj' with exclude selects 4 of 42 modules
"""
    )


@needs_mlx_lm
def test_it_excludes_several_patterns(folder, capsys):
    excludes = [f"--exclude=model.layers.{number}.**" for number in (0, 2)]
    assert main([folder(LLAMA), "**.q_proj", *excludes]) == 0
    summary = capsys.readouterr().out.splitlines()[-1]
    assert summary == "'**.q_proj' with exclude selects 1 of 42 modules"


@needs_mlx_lm
def test_it_quantizes_as_the_config_says(folder, capsys):
    assert main([folder(QUANTIZED)]) == 0
    assert (
        capsys.readouterr().out
        == """\
Model                                                                                               175.0K params   146.9 KB   bfloat16, uint32
  model                                  LlamaModel                                                 175.0K          146.9 KB   bfloat16, uint32
    embed_tokens                         QuantizedEmbedding(1000, 64, group_size=32, bits=8)        64.0K           72.0 KB    bfloat16, uint32
    layers[0:2]                          TransformerBlock(4 heads)                             x2   74.0K           42.0 KB    bfloat16, uint32
      self_attn                          Attention(4 heads, 2 kv heads)                        x2   24.6K           13.8 KB    bfloat16, uint32
        {q,o}_proj                       QuantizedLinear(64 -> 64, group_size=64, bits=4)      x4   16.4K           9.2 KB     bfloat16, uint32
        {k,v}_proj                       QuantizedLinear(64 -> 32, group_size=64, bits=4)      x4   8.2K            4.6 KB     bfloat16, uint32
        rope                             RoPE(16)                                              x2
      mlp                                MLP                                                   x2   49.2K           27.6 KB    bfloat16, uint32
        {gate,up}_proj                   QuantizedLinear(64 -> 128, group_size=64, bits=4)     x4   32.8K           18.4 KB    bfloat16, uint32
        down_proj                        QuantizedLinear(128 -> 64, group_size=64, bits=4)     x2   16.4K           9.2 KB     bfloat16, uint32
      {input,post_attention}_layernorm   RMSNorm(64, eps=1e-05)                                x4   256             512 B      bfloat16
    layers.2                             TransformerBlock(4 heads)                                  37.0K           32.8 KB    bfloat16, uint32
      self_attn                          Attention(4 heads, 2 kv heads)                             12.3K           6.9 KB     bfloat16, uint32
        {q,o}_proj                       QuantizedLinear(64 -> 64, group_size=64, bits=4)      x2   8.2K            4.6 KB     bfloat16, uint32
        {k,v}_proj                       QuantizedLinear(64 -> 32, group_size=64, bits=4)      x2   4.1K            2.3 KB     bfloat16, uint32
        rope                             RoPE(16)
      mlp                                MLP                                                        24.6K           25.6 KB    bfloat16, uint32
        {gate,up}_proj                   QuantizedLinear(64 -> 128, group_size=64, bits=4)     x2   16.4K           9.2 KB     bfloat16, uint32
        down_proj                        Linear(128 -> 64)                                          8.2K            16.4 KB    bfloat16
      {input,post_attention}_layernorm   RMSNorm(64, eps=1e-05)                                x2   128             256 B      bfloat16
    norm                                 RMSNorm(64, eps=1e-05)                                     64              128 B      bfloat16
"""
    )


@needs_mlx_lm
def test_it_prints_data(folder, capsys):
    assert main([folder(LLAMA), "**.self_attn", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["modules"], data["selected"]) == (42, 3)
    assert [place["path"] for place in data["places"] if place["selected"]] == [
        "model.layers[0:3].self_attn"
    ]
    assert data["places"][2] == {
        "path": "model.embed_tokens",
        "class": "Embedding",
        "text": "Embedding(1000, 64)",
        "count": 1,
        "params": 64000,
        "trainable": 64000,
        "bytes": 128000,
        "dtypes": ["bfloat16"],
        "selected": False,
        "note": "",
    }
    assert main([folder(LLAMA), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["selected"] is None


@needs_mlx_lm
def test_data_comes_in_short_lines(folder, capsys):
    assert main([folder(LLAMA), "--json"]) == 0
    assert capsys.readouterr().out.startswith('{\n "modules": 42,\n "selected": null,\n "places"')


@needs_mlx_lm
@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, "float32"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "float16"),
        ({"dtype": None, "torch_dtype": "torch.float16"}, "float16"),
        ({"text_config": {"dtype": "float16"}}, "float16"),
        ({"text_config": {"torch_dtype": "float16"}}, "float16"),
        ({"text_config": None}, "float32"),
        ({"dtype": "auto", "text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": "bfloat16", "text_config": {"dtype": "float16"}}, "bfloat16"),
        ({"dtype": "array"}, "float32"),
    ],
)
def test_the_dtype_is_that_of_the_config(folder, capsys, config, dtype):
    bare = {key: value for key, value in LLAMA.items() if key != "torch_dtype"}
    assert main([folder({**bare, **config}), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["places"][0]["dtypes"] == [dtype]


@needs_mlx_lm
@pytest.mark.parametrize(
    ("quantization", "embedding", "down", "up"),
    [
        (None, "", "", ""),
        ({}, "", "", ""),
        ({"group_size": 32}, *["group_size=32, bits=4"] * 3),
        ({"group_size": 64, "bits": 8}, *["group_size=64, bits=8"] * 3),
        (
            {"group_size": 32, "bits": 4, "mode": "mxfp4"},
            *["group_size=32, bits=4, mode=mxfp4"] * 3,
        ),
        ({"group_size": 128, "bits": 8}, "", "group_size=128, bits=8", ""),
        (
            {"group_size": 64, "model.embed_tokens": False, "model.layers.0.mlp.up_proj": True},
            "", "group_size=64, bits=4", "group_size=64, bits=4",
        ),
    ],
)  # fmt: skip
def test_what_fits_is_quantized_as_the_config_says(
    folder, capsys, quantization, embedding, down, up
):
    config = {**LLAMA, "num_hidden_layers": 1, "quantization": quantization}
    assert main([folder(config), "**.{embed_tokens,up_proj,down_proj}", "--json"]) == 0
    places = json.loads(capsys.readouterr().out)["places"]
    assert [place["text"] for place in places if place["selected"]] == [
        f"Quantized{text}, {settings})" if settings else f"{text})"
        for text, settings in [
            ("Embedding(1000, 64", embedding),
            ("Linear(128 -> 64", down),
            ("Linear(64 -> 128", up),
        ]
    ]


MIXTURE = {
    "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 96,
    "num_attention_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "moe_intermediate_size": 32, "rms_norm_eps": 1e-05, "vocab_size": 96,
    "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "max_position_embeddings": 512, "norm_topk_prob": True,
    "quantization": {"group_size": 32, "bits": 4},
}  # fmt: skip


@needs_mlx_lm
def test_a_model_may_say_itself_how_it_is_quantized(folder, capsys):
    assert main([folder(MIXTURE), "**.mlp.**"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("*")]
    assert [re.split("   +", line[1:].strip())[:2] for line in lines] == [
        ["gate", "QuantizedLinear(64 -> 4, group_size=64, bits=8)"],
        ["switch_mlp", "SwitchGLU"],
        ["{gate,up}_proj", "QuantizedSwitchLinear(4 experts, 64 -> 32, group_size=32, bits=4)"],
        ["down_proj", "QuantizedSwitchLinear(4 experts, 32 -> 64, group_size=32, bits=4)"],
        ["activation", "SwiGLU"],
    ]


@needs_mlx_lm
def test_the_inputs_of_an_expert_have_to_fit_and_not_its_outputs(folder, capsys):
    config = {**MIXTURE, "quantization": {"group_size": 64, "bits": 4}}
    assert main([folder(config), "**.switch_mlp.*_proj"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("*")]
    assert [re.split("   +", line[1:].strip())[:2] for line in lines] == [
        ["{gate,up}_proj", "QuantizedSwitchLinear(4 experts, 64 -> 32, group_size=64, bits=4)"],
        ["down_proj", "SwitchLinear(4 experts, 32 -> 64)"],
    ]


@needs_mlx_lm
def test_nothing_is_computed(folder):
    big = {"hidden_size": 2**15, "intermediate_size": 2**17, "num_hidden_layers": 200}
    before = mx.get_active_memory()
    assert main([folder({**QUANTIZED, **big}), "--json"]) == 0
    assert mx.get_active_memory() - before < 2**20


def as_a_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlx_modswap", *arguments],
        capture_output=True,
        text=True,
        # Not the source folder, if Python is new enough to be told so (3.11).
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"},
    )


@needs_mlx_lm
def test_it_runs_as_a_module(folder):
    run = as_a_module(folder(LLAMA), "**.norm")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines()[-1] == "'**.norm' selects 1 of 42 modules"


# ---------------------------------------------------------------- one line for what is wrong


@needs_mlx_lm
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("q_proj", "'q_proj' matches nothing; '**.q_proj' matches 3"),
        ("a**", "'**' must be a segment of its own; write 'a.**'"),
    ],
)
def test_a_wrong_pattern(folder, capsys, pattern, message):
    assert main([folder(LLAMA), pattern]) == 2
    assert capsys.readouterr() == ("", f"mlx_modswap: {message}\n")


@needs_mlx_lm
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            "{",
            "mlx-lm builds no model from {folder}: JSONDecodeError: Expecting property name",
        ),
        (
            {**LLAMA, "quantization": {"bits": 4}},
            "mlx-lm builds no model from {folder}: KeyError: 'group_size'",
        ),
        ("[]", "mlx-lm builds no model from {folder}: TypeError: "),
        ("{}", "mlx-lm builds no model from {folder}: KeyError: 'model_type'"),
        (
            {"model_type": "no_such_model"},
            "mlx-lm builds no model from {folder}: ValueError: Model type no_such_model not supported.",
        ),
        (
            {"model_type": "llama"},
            "mlx-lm builds no model from {folder}: TypeError: ModelArgs.__init__() missing",
        ),
    ],
)
def test_a_wrong_config(folder, capsys, config, message):
    path = folder(config)
    with pytest.raises(SystemExit) as error:
        main([path])
    assert str(error.value).startswith(f"mlx_modswap: {message.replace('{folder}', path)}")
    assert "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")


@needs_mlx_lm
def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path)])
    assert str(error.value) == (
        f"mlx_modswap: mlx-lm builds no model from {tmp_path}: FileNotFoundError: "
        f"[Errno 2] No such file or directory: '{tmp_path}/config.json'"
    )


@needs_mlx_lm
def test_the_process_without_a_model_ends_with_one_line_and_status_1(tmp_path):
    run = as_a_module(str(tmp_path))
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith(f"mlx_modswap: mlx-lm builds no model from {tmp_path}: ")
    assert run.stderr.count("\n") == 1


def test_without_mlx_lm(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(SystemExit) as error:
        main(["anywhere"])
    assert str(error.value) == "mlx_modswap: this needs mlx-lm: pip install mlx-lm"


def test_no_arguments(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "the following arguments are required: MODEL_DIR" in capsys.readouterr().err


def test_the_help_says_what_can_be_given(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    for part in [
        "usage: python -m mlx_modswap [-h] [--exclude PATTERN] [--json] MODEL_DIR [PATTERN] Draw a",
        "MODEL_DIR a folder with a config.json PATTERN such as '**.q_proj', in quotes options:",
        "--exclude PATTERN what not to select --json print data, not a picture; see below --json",
    ]:
        assert part in words


def test_the_help_describes_the_data(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    for key in ("path", "class", "text", "count", "params, trainable, bytes, dtypes", "selected"):
        assert f"\n    {key}" in printed
