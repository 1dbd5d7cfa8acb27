"""Arguments are judged by the modules that `where` accepts, and how `where` is asked."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import mlx.nn as nn
import pytest
from models import Block, build, fresh, identity, transformer
from oracle import Snapshot

from mlx_modswap import (
    NoMatchError,
    capture,
    patch,
    replace_layers,
    select,
    swapped,
    tree,
)


def is_linear(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


PATTERNS = [
    (
        ["**.q_proj", "**.norm"],
        {},
        "where=Linear rejects all 4 modules that '**.norm' matches: 4 LayerNorm",
    ),
    (
        ["**.q_proj", "embed"],
        {},
        "where=Linear rejects the only module that 'embed' matches: Embedding",
    ),
    # What it would let through inside is suggested.
    (
        ["head", "**.self_attn"],
        {},
        "where=Linear rejects all 4 modules that '**.self_attn' matches: 4 SelfAttention; "
        "'**.self_attn.**' matches 8",
    ),
    (
        "layers[:2]",
        {},
        "where=Linear rejects both modules that 'layers[:2]' matches: 2 Block; "
        "'layers[:2].**' matches 6",
    ),
    (
        ["embed", "layers[0]"],
        {},
        "where=Linear rejects both modules that 'embed', 'layers[0]' match: "
        "1 Embedding, 1 Block; 'layers[0].**' matches 3",
    ),
    (
        re.compile(r"layers\.\d\.self_attn"),
        {},
        "where=Linear rejects all 4 modules that re.compile('layers\\\\.\\\\d\\\\.self_attn') "
        "matches: 4 SelfAttention",
    ),
    # Of those inside only what no exclude leaves alone is counted.
    (
        ["head", "**.self_attn"],
        {"exclude": "**.q_proj"},
        "exclude '**.q_proj' has no effect: it matches 4 modules, "
        "but none of the 5 matched by 'head', '**.self_attn'",
    ),
    (
        ["head", "**.self_attn"],
        {"exclude": ["head"]},
        "where=Linear rejects all 4 modules that are left of 'head', '**.self_attn' after "
        "exclude: 4 SelfAttention; '**.self_attn.**' matches 8",
    ),
    (
        ["**.mlp", "**.self_attn"],
        {"exclude": "layers[0]"},
        "where=Linear rejects all 4 modules that '**.self_attn' matches: 4 SelfAttention; "
        "'**.self_attn.**' matches 6",
    ),
    (
        "layers.*",
        {"exclude": "layers[-1]"},
        "where=Linear rejects all 3 modules that are left of 'layers.*' after exclude: 3 Block; "
        "'layers.*.**' matches 9",
    ),
    # An exclude of what `where` rejects anyway.
    (
        "**",
        {"exclude": "**.norm"},
        "exclude '**.norm' has no effect: where=Linear rejects all 4 modules that it would "
        "exclude: 4 LayerNorm",
    ),
    (
        "**.{mlp,norm}",
        {"exclude": "**.{norm,q_proj}"},  # no pattern matches the q_proj
        "exclude '**.{norm,q_proj}' has no effect: where=Linear rejects all 4 modules that it "
        "would exclude: 4 LayerNorm",
    ),
    (
        ["**.mlp", "embed", "head"],
        {"exclude": ["embed", "head"]},
        "exclude 'embed' has no effect: where=Linear rejects the only module that it would "
        "exclude: Embedding",
    ),
]


@pytest.mark.parametrize("where", [nn.Linear, is_linear], ids=["a class", "a function"])
@pytest.mark.parametrize(("pattern", "options", "message"), PATTERNS)
def test_what_where_rejects_counts_as_no_match(pattern, options, message, where):
    model = transformer()
    before = Snapshot(model)
    options = {"where": where, **options}
    calls: list[Callable[[], Any]] = [
        lambda: select(model, pattern, **options),
        lambda: tree(model, pattern, **options),
        lambda: replace_layers(model, pattern, fresh, **options),
        lambda: swapped(model, pattern, fresh, **options).__enter__(),
        lambda: capture(model, pattern, **options).__enter__(),
        lambda: patch(model, pattern, lambda path, output: output, **options).__enter__(),
    ]
    for call in calls:
        with pytest.raises(NoMatchError) as error:
            call()
        assert str(error.value) == message.replace("where=Linear", f"where={where.__name__}")
    assert before.differences() == []
    found = select(model, pattern, **options, strict=False)
    assert all(isinstance(module, nn.Linear) for module in found.values())


QUIET = [
    ("layers.*.*", {"exclude": "layers[0]"}, 3),
    (["**.q_proj", "**.norm", "head"], {"exclude": "**.norm", "strict": False}, 5),
    # Excluded as a whole, whatever `where` says of it.
    (["**.mlp", "layers[0].norm"], {"exclude": "layers[0]"}, 3),
    (["**.mlp", "layers[0].self_attn"], {"exclude": "layers[0]"}, 3),
    # All that `where` accepts is excluded; it would be the same without what it rejects.
    (["head", "layers[0].{mlp,norm}"], {"exclude": "**.mlp"}, 1),
    (["**.q_proj", "layers.*.{mlp,norm}"], {"exclude": ["layers[0].self_attn", "**.mlp"]}, 3),
    # A `None` rule for a container that is not a Linear itself.
    ({"layers[0]": None, "**": fresh}, {}, 10),
    ({"layers": None, "**": fresh}, {}, 1),
    ({("layers[0]", "**.norm", "**.mlp"): None, "**": fresh}, {"strict": False}, 7),
    # Rules.
    ({"layers[0].mlp": identity, "**": fresh}, {"exclude": "layers[0]"}, 10),
    ({("**.mlp", "**.q_proj"): identity, "**": fresh}, {}, 13),
    (
        {("**.mlp", "layers[1].mlp"): identity, "**": fresh},
        {},
        13,
    ),  # each matches one, and they decide one
    ({"layers[0].norm": identity, "**": fresh}, {"exclude": "layers[0]"}, 10),
]


@pytest.mark.parametrize("where", [nn.Linear, is_linear], ids=["a class", "a function"])
@pytest.mark.parametrize(("pattern", "options", "count"), QUIET)
def test_what_has_an_effect_is_accepted(pattern, options, count, where):
    arguments: Any = (pattern,) if isinstance(pattern, dict) else (pattern, fresh)
    assert len(replace_layers(transformer(), *arguments, where=where, **options)) == count


class Asked:
    """A `where` that remembers about which paths it was asked."""

    def __init__(self, answer: Callable[[str, nn.Module], Any] = is_linear):
        self.answer = answer
        self.paths: list[str] = []

    def __call__(self, path: str, module: nn.Module) -> Any:
        self.paths.append(path)
        return self.answer(path, module)


ASKED = [
    # Once about each module that a pattern matches, in the order of the model.
    (["head", "**.q_proj"], (), [*(f"layers.{n}.self_attn.q_proj" for n in range(4)), "head"]),
    (["head", "head"], (), ["head"]),
    # About excluded ones as well,
    ("**.mlp", "layers[1:]", ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp", "layers.3.mlp"]),
    (
        ["layers[:2].mlp", "head"],
        ["layers[1]", "layers.*.mlp"],
        ["layers.0.mlp", "layers.1.mlp", "head"],
    ),
    # but never about what no pattern matches.
    ("layers[:2].mlp", "layers[0]", ["layers.0.mlp", "layers.1.mlp"]),
]


@pytest.mark.parametrize(("pattern", "exclude", "asked"), ASKED)
def test_where_is_asked_once_about_each_match(pattern, exclude, asked):
    where = Asked()
    select(transformer(), pattern, where=where, exclude=exclude)
    assert where.paths == asked
    where = Asked()
    replace_layers(transformer(), pattern, fresh, where=where, exclude=exclude)
    assert where.paths == asked


def test_where_is_not_asked_about_excluded_modules_if_not_strict():
    where = Asked()
    select(transformer(), "**.mlp", where=where, exclude="layers[1:]", strict=False)
    assert where.paths == ["layers.0.mlp"]


def test_an_exception_about_an_excluded_module_is_an_effect():
    model = transformer()

    def is_wide(path: str, module: Any) -> bool:
        return module.weight.shape[-1] > 1  # a Block has no weight

    with pytest.raises(AttributeError):
        select(model, "layers.0.**", where=is_wide)
    for pattern in ("layers.0.**", "layers.0.*"):  # the latter fails on all that is excluded
        found = select(model, pattern, where=is_wide, exclude="layers[0].{self_attn,acts}")
        assert list(found) == ["layers.0.norm", "layers.0.mlp"]
    report = replace_layers(model, {"head": identity, "**": fresh}, where=is_wide, exclude="layers")
    assert list(report) == ["embed", "head"]


def test_an_interrupt_is_not_an_answer():
    def interrupted(path: str, module: nn.Module) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        select(transformer(), ["head", "embed"], where=interrupted, exclude="embed")


def test_a_suggestion_on_which_where_fails_is_left_out():
    def is_wide(path: str, module: Any) -> bool:
        return not isinstance(module, Block) and module.weight.shape[-1] > 1

    with pytest.raises(NoMatchError) as error:
        select(transformer(), "layers.*", where=is_wide)
    assert (
        str(error.value) == "where=is_wide rejects all 4 modules that 'layers.*' matches: 4 Block"
    )


class Never:
    """A `where` without a name."""

    def __call__(self, path: str, module: nn.Module) -> bool:
        return False

    def __repr__(self) -> str:
        return "Never()"


def test_a_where_without_a_name_is_shown_by_its_repr():
    with pytest.raises(NoMatchError) as error:
        select(transformer(), "head", where=Never())
    assert str(error.value) == "where=Never() rejects the only module that 'head' matches: Linear"


class RMSNorm(nn.Module):
    """A class with the name of one of MLX, as in some models of mlx-lm."""


HERE = __name__


CLASSES = [
    (
        (nn.Conv1d, nn.Embedding),
        ["norms.*", "head"],
        "where=(Conv1d, Embedding) rejects all 3 modules that 'norms.*', 'head' match: 2 RMSNorm, "
        "1 Linear",
    ),
    (
        nn.RMSNorm,
        "norms.*",
        f"where=mlx.nn.RMSNorm rejects both modules that 'norms.*' matches: 2 {HERE}.RMSNorm",
    ),
    (
        (nn.Embedding, nn.RMSNorm),
        ["norms.*", "head"],
        "where=(Embedding, mlx.nn.RMSNorm) rejects all 3 modules that 'norms.*', 'head' match: "
        f"2 {HERE}.RMSNorm, 1 Linear",
    ),
    (
        nn.Embedding | nn.RMSNorm,
        "norms[0]",
        "where=Embedding | mlx.nn.RMSNorm rejects the only module that 'norms[0]' matches: "
        f"{HERE}.RMSNorm",
    ),
    (
        nn.Embedding,
        "**",
        f"where=Embedding rejects all 4 modules that '**' matches: 2 {HERE}.RMSNorm, "
        "1 mlx.nn.RMSNorm, 1 Linear",
    ),
    (
        (nn.Embedding, (nn.Conv1d, nn.RMSNorm)),
        "head",
        "where=(Embedding, (Conv1d, RMSNorm)) rejects the only module that 'head' matches: Linear",
    ),
]


@pytest.mark.parametrize(("where", "pattern", "message"), CLASSES)
def test_classes_of_one_name_have_their_module_names(where, pattern, message):
    model = build(norms=[RMSNorm(), RMSNorm()], own=nn.RMSNorm(2), head=nn.Linear(2, 2))
    with pytest.raises(NoMatchError) as error:
        select(model, pattern, where=where)
    assert str(error.value) == message


def test_norms_of_gemma2_are_not_those_of_mlx(needs):
    needs("mlx_lm")
    from mlx_lm.models import gemma2

    sizes: Any = {"hidden_size": 8, "intermediate_size": 8, "head_dim": 4, "vocab_size": 8}
    heads: Any = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = gemma2.Model(
        gemma2.ModelArgs(
            model_type="gemma2", num_hidden_layers=2, rms_norm_eps=1e-5, **sizes, **heads
        )
    )
    with pytest.raises(NoMatchError) as error:
        select(model, "**", where=nn.RMSNorm)
    assert str(error.value) == (
        "where=mlx.nn.RMSNorm rejects all 33 modules that '**' matches: 14 Linear, "
        "9 mlx_lm.models.gemma2.RMSNorm, 2 TransformerBlock, 2 Attention, 2 RoPE, 2 MLP, "
        "1 GemmaModel, 1 Embedding"
    )


# ---------------------------------------------------------------- not a `where`


def has_weight(module: Any) -> bool:
    return module.weight is not None


def has_a_weight(module: Any, name: str) -> bool:
    return module.weight is not None


WHERE = "it was called as where(path, module)"


WRONG_WHERE = {
    "a lambda of one": (
        lambda module: True,
        "<lambda>() takes 1 positional argument but 2 were given",
        WHERE,
    ),
    "a function of one": (
        has_weight,
        "has_weight() takes 1 positional argument but 2 were given",
        WHERE,
    ),
    "a function that takes the path for a module": (
        lambda module, key="weight": module.weight is not None,
        "'str' object has no attribute 'weight'",
        WHERE,
    ),
    "a function that has a name": (
        has_a_weight,
        "'str' object has no attribute 'weight'",
        f"{WHERE}; write lambda path, module: has_a_weight(module)",
    ),
}


@pytest.mark.parametrize(("where", "text", "note"), WRONG_WHERE.values(), ids=WRONG_WHERE)
def test_a_where_for_another_call(where, text, note):
    with pytest.raises((TypeError, AttributeError)) as error:
        select(build(head=nn.Linear(2, 2)), "head", where=where)
    assert str(error.value) == text
    assert error.value.__notes__ == ["while asking where of 'head' (Linear)", note]


def test_a_where_that_fails_for_another_reason():
    with pytest.raises(AttributeError) as error:
        select(build(head=nn.Linear(2, 2)), "head", where=lambda path, module: module.nothing)
    assert str(error.value) == "'Linear' object has no attribute 'nothing'"
    assert error.value.__notes__ == ["while asking where of 'head' (Linear)"]


@pytest.mark.parametrize(
    ("where", "what"),
    [(3, "an int"), ((nn.Linear, 3), "a tuple of 2"), (nn.ReLU(), "a module (ReLU)")],
)
def test_a_bad_where(where, what):
    with pytest.raises(TypeError) as error:
        select(transformer(), "**", where=where)
    assert str(error.value) == (
        f"where must be a class, a tuple of classes or a function of path and module, not {what}"
    )
