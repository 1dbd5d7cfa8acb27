"""examples/finetune_lora.py trains adapters of two ranks that mlx-lm reads."""

from __future__ import annotations

import importlib
import importlib.util
import io
import re
import subprocess
import sys
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path

import pytest
from adapting import arrays_of, config_of

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT = "The lighthouse keeper has a cat. Its name is"


@pytest.fixture(scope="module")
def workplace(smollm2, tmp_path_factory) -> Path:
    """The working folder of a reader who has run smollm2.py."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "smollm2").symlink_to(smollm2, target_is_directory=True)
    return folder


@pytest.fixture(scope="module")
def printed(workplace) -> str:
    """What the example prints in a folder of its own."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.chdir(workplace)
        importlib.import_module("finetune_lora").main([])
    return out.getvalue()


def test_the_report_has_a_line_for_each_rank(printed):
    attention, mlp = printed.splitlines()[:2]

    assert re.match(
        r"model\.layers\[22:30\]\.self_attn\.\{q,v\}_proj +Linear -> LoRALinear +x16", attention
    )
    assert re.match(r"model\.layers\[22:30\]\.mlp\.down_proj +Linear -> LoRALinear +x8", mlp)
    assert "trainable: 48 arrays, all of them lora_a or lora_b\n" in printed


def test_the_loss_goes_down_step_by_step(printed):
    losses = [float(loss) for loss in re.findall(r"step \d   loss ([\d.]+)", printed)]

    assert len(losses) == 6
    assert all(later < sooner for sooner, later in pairwise(losses))
    assert losses[-1] < losses[0] / 10


def test_the_model_learns_the_name_and_mlx_lm_loads_what_it_learned(printed):
    said = dict(re.findall(rf"(?m)^(\w+).*   {re.escape(PROMPT)} (.*)$", printed))

    assert list(said) == ["before", "after", "loaded"]
    assert "Biscuit" not in said["before"]
    assert said["after"].startswith("Biscuit")
    assert said["loaded"] == said["after"]
    difference = re.search(r"between the logits of the last two   ([\d.e-]+)", printed)
    assert difference is not None
    assert float(difference[1]) <= 0.05  # in float16, of logits up to 30


def test_the_folder_has_both_ranks(printed, workplace):
    config = config_of(workplace / "smollm2-lora")
    shapes = {array.shape for array in arrays_of(workplace / "smollm2-lora").values()}

    assert (config["num_layers"], config["lora_parameters"]) == (
        8,
        {
            "rank": 8,
            "scale": 10.0,
            "dropout": 0.0,
            "keys": ["mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj"],
        },
    )
    assert {entry["rank"] for entry in config["mlx_modswap"].values()} == {4, 8}
    assert shapes == {(576, 8), (8, 576), (8, 192), (1536, 8)}


def test_the_command_that_it_prints_names_what_it_made(printed):
    command = printed.partition("Try them:\n")[2]

    assert command == (
        "mlx_lm.generate --model smollm2 --adapter-path smollm2-lora --ignore-chat-template \\\n"
        f'    --prompt "{PROMPT}"\n'
    )


def test_without_mlx_lm_the_example_says_what_to_install():
    code = (
        "import sys\n"
        "sys.modules['mlx_lm'] = None\n"
        f"sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import finetune_lora\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "mlx-lm is not installed: pip install 'mlx-modswap[lm]'\n"
