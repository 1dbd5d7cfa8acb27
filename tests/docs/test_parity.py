"""What mlx-lm does to a model is one call here, and gives the same model: row by row of the table
in docs/parity.md. Then the places where mlx-lm goes wrong.
"""

from __future__ import annotations

from importlib.metadata import version
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
import zoo
from programs import parity

from mlx_modswap import NoMatchError, PatternError, SelectionError, replace_layers, select

# One of each kind. Continuous integration takes more, and the nightly profile all.
SOME = [
    *("afm7", "bitnet", "deepseek_v3", "gemma3n", "gpt2", "gpt_oss"),
    *("jamba", "llama", "mixtral", "olmo", "prism_hadamard_qwen35", "rwkv7"),
]
MORE = [
    *SOME,
    *("gemma3", "kimi_k3", "longcat_flash", "mamba2", "phi3", "plamo2", "qwen3_next", "seed_oss"),
]
INSTALLED = zoo.installed()


def pytest_generate_tests(metafunc):
    if "architecture" in metafunc.fixturenames:
        profile = metafunc.config.getoption("--hypothesis-profile")
        names = {"ci": MORE, "nightly": zoo.ARCHITECTURES}.get(profile, SOME)
        metafunc.parametrize("architecture", [name for name in names if name in INSTALLED])


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    with mx.stream(mx.cpu):
        yield


@pytest.fixture(scope="module")
def lm() -> SimpleNamespace:
    """The names that the document defines: factories, and what it takes from mlx-lm."""
    names = {"__name__": "document"}
    exec(parity.preamble(), names)
    return SimpleNamespace(**names)


@pytest.fixture
def llama():
    return zoo.build("llama")


# The table


def test_each_row_of_the_table_makes_the_same_model_as_mlx_lm(architecture):
    outcomes = {name: parity.compare(name, architecture) for name in parity.rows()}

    assert {name: o for name, o in outcomes.items() if o.kind in parity.BAD} == {}


@pytest.mark.parametrize("name", parity.rows())
def test_each_row_of_the_table_changes_a_llama_or_a_mixtral(name):
    kinds = {parity.compare(name, architecture).kind for architecture in ("llama", "mixtral")}

    # BitLinear is a Metal kernel.
    assert (parity.NOT_RUN if name == "BitLinear for all but some" else parity.EXACT) in kinds


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        ("LoRA in all layers of the last blocks", "[-2:]", "[-1:]"),
        ("LoRA in the layers that a config lists", "lora)", "dora)"),
        ("LoRA in the embedding", "lora,", "lambda path, layer: layer.freeze() and layer,"),
        ("quantize", "quantized(4)", "quantized(8)"),
        ("fuse adapters", "fused,", "without_adapter,"),
        (
            "dequantize",
            "dequantized,",
            "lambda path, layer: nn.Linear(*reversed(layer.weight.shape)),",
        ),
    ],
)
def test_a_row_that_does_something_else_is_noticed(monkeypatch, row, right, wrong):
    rows = parity.rows()
    assert right in rows[row].ours
    changed = rows[row]._replace(ours=rows[row].ours.replace(right, wrong))
    monkeypatch.setattr(parity, "rows", lambda: {**rows, row: changed})

    assert parity.compare.__wrapped__(row, "llama").kind == parity.DIFFERENT


@pytest.mark.parametrize("recipe", [(2, 6), (3, 4), (3, 6), (4, 6)])
@pytest.mark.parametrize("n", [1, 7, 8, 17, 32])
def test_the_rules_for_a_recipe_choose_the_bits_that_mlx_lm_chooses(lm, recipe, n):
    model = zoo.build("llama", num_hidden_layers=n, layer_types=None)
    low, high = recipe
    bits = lm.mixed_quant_predicate_builder(f"mixed_{low}_{high}", model)
    rules = lm.mixed(low, high, "model.layers", n)
    expected = {path: bits(path, model)["bits"] for path in select(model, "**", where=nn.Linear)}
    changed = replace_layers(model, rules, where=nn.Linear, strict=False)

    assert {path: layer.bits for path, layer in changed.items()} == expected


def test_the_figures_in_the_document_are_those_of_a_full_run(nightly):
    text = parity.DOCUMENT.read_text("utf-8")
    if not nightly:
        pytest.skip("a full run takes minutes: --hypothesis-profile nightly")
    if f"mlx-lm {version('mlx-lm')}" not in text or f"MLX {version('mlx')}" not in text:
        pytest.skip("the document speaks of another version")

    assert parity.figures(zoo.ARCHITECTURES) in text


# Where mlx-lm goes wrong


def test_mlx_lm_puts_adapters_into_adapters_and_a_named_place_does_not(lm, llama):
    lm.linear_to_lora_layers(llama, 4, lm.config)
    lm.linear_to_lora_layers(llama, 4, lm.config)

    assert isinstance(llama.layers[0].self_attn.q_proj.linear, lm.LoRALinear)
    with pytest.raises(NoMatchError, match="matches: 4 LoRALinear; '"):
        replace_layers(llama, "model.layers.*.self_attn.q_proj", lm.lora, where=lm.LINEAR)


def test_everything_is_also_the_layer_inside_an_adapter(lm, llama):
    def outside(path, layer):
        return lm.adaptable(path, layer) and not path.endswith(".linear")

    replace_layers(llama, "model.layers.**", lm.lora, where=outside)
    with pytest.raises(NoMatchError, match="where=outside rejects all 108 modules that"):
        replace_layers(llama, "model.layers.**", lm.lora, where=outside)
    replace_layers(llama, "model.layers.**", lm.lora, where=lm.adaptable)

    assert isinstance(llama.layers[0].self_attn.q_proj.linear, lm.LoRALinear)


def test_mlx_lm_leaves_a_model_half_changed_and_a_failing_factory_does_not(lm):
    theirs, ours = zoo.build("llama"), zoo.build("llama")
    for model in (theirs, ours):
        lm.linear_to_lora_layers(model, 2, lm.config)
    then = dict(ours.named_modules())

    def picky(path, layer):
        if isinstance(layer, lm.LoRALinear):
            raise ValueError("has an adapter")
        return lm.lora(path, layer)

    with pytest.raises(ValueError, match="LoRALinear"):
        lm.linear_to_lora_layers(theirs, 4, lm.config)
    with pytest.raises(ValueError, match="has an adapter"):
        replace_layers(ours, "model.layers.*.self_attn.*_proj", picky)

    assert isinstance(theirs.layers[0].self_attn.q_proj, lm.LoRALinear)
    assert all(module is then[path] for path, module in ours.named_modules())


def test_no_blocks_are_all_blocks_for_mlx_lm_and_an_error_here(lm, llama):
    with pytest.raises(PatternError, match="-0 counts from the start"):
        replace_layers(llama, f"model.layers[-{0}:].**", lm.lora, where=lm.adaptable)
    lm.linear_to_lora_layers(llama, 0, lm.config)

    assert len(select(llama, "model.layers.*.self_attn.q_proj", where=lm.LoRALinear)) == 4


def test_a_typo_trains_nothing_with_mlx_lm_and_is_an_error_here(lm, llama):
    then = dict(llama.named_modules())
    lm.linear_to_lora_layers(llama, 2, {**lm.config, "keys": ["self_attn.qproj"]})

    assert all(module is then[path] for path, module in llama.named_modules())
    with pytest.raises(NoMatchError, match=r"'model.layers\[-2:\].self_attn.q_proj' matches 2$"):
        replace_layers(llama, "model.layers[-2:].self_attn.qproj", lm.lora)


class Translator(nn.Module):
    """Two halves that share an embedding."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(96, 64)
        self.encoder = nn.Sequential(self.shared, nn.Linear(64, 64))
        self.decoder = nn.Sequential(self.shared, nn.Linear(64, 64))

    def ties(self) -> bool:
        return self.shared is self.encoder.layers[0] is self.decoder.layers[0]


def test_a_shared_layer_becomes_several_with_mlx_lm_and_stays_one_here(lm):
    theirs, ours = Translator(), Translator()
    nn.quantize(theirs, 32, 4)
    replace_layers(ours, "**", lm.quantized(4), where=lm.quantizable)

    assert not theirs.ties()
    assert ours.ties()
    assert isinstance(ours.shared, nn.QuantizedEmbedding)

    # mlx-lm's own loops call once for each place, too.
    assert not lm.dequantize_model(ours).ties()


def test_a_part_of_a_shared_layer_is_an_error(lm):
    with pytest.raises(SelectionError, match=r"is tied to 'shared', 'decoder\.layers\.0'"):
        replace_layers(Translator(), "encoder.**", lm.quantized(4), where=lm.quantizable)


def test_mlx_lm_brings_training_mode_into_a_model_that_is_not_in_it_and_this_does_not(lm):
    theirs, ours = zoo.build("llama").eval(), zoo.build("llama").eval()
    lm.linear_to_lora_layers(theirs, 2, lm.config)
    replace_layers(ours, "model.layers[-2:].**", lm.lora, where=lm.adaptable)

    assert any(module.training for module in theirs.modules())
    assert not any(module.training for module in ours.modules())


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("make", ["lora", "dora"])
def test_adapters_of_all_kinds_come_off_and_leave_the_layers_that_were_there(lm, make, name):
    model = zoo.build(name)
    then = dict(model.named_modules())
    kinds = lm.LINEAR + lm.EMBEDDING + (lm.EXPERTS if make == "lora" else ())
    replace_layers(model, "**", getattr(lm, make), where=kinds)
    left = [type(m) for m in lm.remove_lora_layers(model).modules() if isinstance(m, lm.ADAPTER)]
    replace_layers(model, "**", lm.without_adapter, where=lm.ADAPTER)

    assert left
    now = dict(model.named_modules())
    assert list(now) == list(then)
    assert all(now[path] is then[path] for path in then)
