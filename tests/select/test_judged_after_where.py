"""Whether an argument does something is judged on the modules that `where` accepts."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import mlx.nn as nn
import pytest
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


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(2, 2)
        self.v_proj = nn.Linear(2, 2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(2)
        self.attention = Attention()
        self.mlp = nn.Linear(2, 2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(2, 2)
        self.layers = [Block() for _ in range(4)]
        self.head = nn.Linear(2, 2)


def q4(path: str, layer: nn.Module) -> nn.Module:
    return nn.Identity()


def q8(path: str, layer: nn.Module) -> nn.Module:
    return nn.Identity()


def is_linear(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


PATTERNS = [
    (
        ["**.q_proj", "**.norm1"],
        {},
        "where=Linear rejects all 4 modules that '**.norm1' matches: 4 LayerNorm",
    ),
    (
        ["**.q_proj", "embed"],
        {},
        "where=Linear rejects the only module that 'embed' matches: Embedding",
    ),
    # What it would let through inside is suggested.
    (
        ["head", "**.attention"],
        {},
        "where=Linear rejects all 4 modules that '**.attention' matches: 4 Attention; "
        "'**.attention.**' matches 8",
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
        re.compile(r"layers\.\d\.attention"),
        {},
        "where=Linear rejects all 4 modules that re.compile('layers\\\\.\\\\d\\\\.attention') "
        "matches: 4 Attention",
    ),
    # Of those inside only what no exclude leaves alone is counted.
    (
        ["head", "**.attention"],
        {"exclude": "**.q_proj"},
        "exclude '**.q_proj' has no effect: it matches 4 modules, "
        "but none of the 5 matched by 'head', '**.attention'",
    ),
    (
        ["head", "**.attention"],
        {"exclude": ["head"]},
        "where=Linear rejects all 4 modules that are left of 'head', '**.attention' after "
        "exclude: 4 Attention; '**.attention.**' matches 8",
    ),
    (
        ["**.mlp", "**.attention"],
        {"exclude": "layers[0]"},
        "where=Linear rejects all 4 modules that '**.attention' matches: 4 Attention; "
        "'**.attention.**' matches 6",
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
        {"exclude": "**.norm1"},
        "exclude '**.norm1' has no effect: where=Linear rejects all 4 modules that it would "
        "exclude: 4 LayerNorm",
    ),
    (
        "**.{mlp,norm1}",
        {"exclude": "**.{norm1,q_proj}"},  # no pattern matches the q_proj
        "exclude '**.{norm1,q_proj}' has no effect: where=Linear rejects all 4 modules that it "
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
def test_a_pattern_or_an_exclude_of_what_where_rejects_is_an_error_everywhere(
    pattern, options, message, where
):
    model = Model()
    before = Snapshot(model)
    options = {"where": where, **options}
    calls: list[Callable[[], Any]] = [
        lambda: select(model, pattern, **options),
        lambda: tree(model, pattern, **options),
        lambda: replace_layers(model, pattern, q4, **options),
        lambda: swapped(model, pattern, q4, **options).__enter__(),
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


RULES = [
    (
        {"**.attention": q8, "**": q4},
        {},
        "rule '**.attention' never applies: where=Linear rejects all 4 modules that it matches: "
        "4 Attention; '**.attention.**' matches 8",
    ),
    (
        {"embed": q8, "**": q4},
        {},
        "rule 'embed' never applies: where=Linear rejects the only module that it matches: "
        "Embedding",
    ),
    (
        {("**.mlp", "**.norm1"): q8, "**": q4},
        {},
        "'**.norm1' in rule ('**.mlp', '**.norm1') never applies: where=Linear rejects all 4 "
        "modules that it matches: 4 LayerNorm",
    ),
    # A rule that leaves alone what would be left alone anyway.
    (
        {"**.norm1": None, "**": q4},
        {},
        "rule '**.norm1' has no effect: where=Linear already leaves alone all 4 modules that it "
        "matches: 4 LayerNorm; remove it",
    ),
    (
        {("embed", "layers[0]"): None, "**": q4},
        {},
        "'embed' in rule ('embed', 'layers[0]') has no effect: where=Linear already leaves alone "
        "the only module that it matches: Embedding; remove it",
    ),
    # Rules that come too late.
    (
        {"**.q_proj": q8, "layers[0].**.q_proj": q4},
        {},
        "rule 'layers[0].**.q_proj' never applies: earlier rules already match its only module; "
        "remove it, or move it up",
    ),
    (
        {"layers": None, "**.{q,v}_proj": q8, "head": q4},
        {},
        "rule '**.{q,v}_proj' never applies: earlier rules already match all 8 of its modules; "
        "remove it, or move it up",
    ),
    (
        {"**.q_proj": q8, "**.v_proj": q8, "**.attention.**": q4, "**.mlp": q4},
        {},
        "rule '**.attention.**' never applies: earlier rules already match all 8 of its modules; "
        "remove it, or move it up",
    ),
    (
        {"layers.*.{mlp,attention}": q8, "layers[:2].{mlp,norm1}": q4},
        {},
        "rule 'layers[:2].{mlp,norm1}' never applies: earlier rules already match all 2 of its "
        "modules that where=Linear accepts; remove it, or move it up",
    ),
    (
        {"layers.*.mlp": q8, "layers[0].{mlp,norm1}": q4},
        {},
        "rule 'layers[0].{mlp,norm1}' never applies: earlier rules already match the only one of "
        "its modules that where=Linear accepts; remove it, or move it up",
    ),
    (
        {"**.q_proj": q8, ("layers[0].attention.q_proj", "layers[1].attention.q_proj"): q4},
        {},
        "rule ('layers[0].attention.q_proj', 'layers[1].attention.q_proj') never applies: earlier "
        "rules already match all 2 of its modules; remove it, or move it up",
    ),
    # What earlier rules leave is what would work.
    (
        {"**.q_proj": q8, "**.attention": q4, "**": q4},
        {},
        "rule '**.attention' never applies: where=Linear rejects all 4 modules that it matches: "
        "4 Attention; '**.attention.**' matches 4",
    ),
    (
        {"**.{q,v}_proj": q8, "**.attention": q4, "**": q4},
        {},
        "rule '**.attention' never applies: where=Linear rejects all 4 modules that it matches: "
        "4 Attention",
    ),
    # Excludes of rules.
    (
        {"**.q_proj": q8, "**": q4},
        {"exclude": ["layers[0]", "**.norm1"]},
        "exclude '**.norm1' has no effect: where=Linear rejects all 4 modules that it would "
        "exclude: 4 LayerNorm",
    ),
]


@pytest.mark.parametrize("where", [nn.Linear, is_linear], ids=["a class", "a function"])
@pytest.mark.parametrize(("rules", "options", "message"), RULES)
def test_a_rule_that_decides_nothing_that_where_lets_through_is_an_error(
    rules, options, message, where
):
    model = Model()
    before = Snapshot(model)
    for swap in (replace_layers, lambda *a, **k: swapped(*a, **k).__enter__()):
        with pytest.raises(NoMatchError) as error:
            swap(model, rules, where=where, **options)
        assert str(error.value) == message.replace("where=Linear", f"where={where.__name__}")
    assert before.differences() == []
    replace_layers(model, rules, where=where, **options, strict=False)


QUIET = [
    ("layers.*.*", {"exclude": "layers[0]"}, 3),
    (["**.q_proj", "**.norm1", "head"], {"exclude": "**.norm1", "strict": False}, 5),
    # Excluded as a whole, whatever `where` says of it.
    (["**.mlp", "layers[0].norm1"], {"exclude": "layers[0]"}, 3),
    (["**.mlp", "layers[0].attention"], {"exclude": "layers[0]"}, 3),
    # All that `where` accepts is excluded; it would be the same without what it rejects.
    (["head", "layers[0].{mlp,norm1}"], {"exclude": "**.mlp"}, 1),
    (["**.q_proj", "layers.*.{mlp,norm1}"], {"exclude": ["layers[0].attention", "**.mlp"]}, 3),
    # A `None` rule for a container that is not a Linear itself.
    ({"layers[0]": None, "**": q4}, {}, 10),
    ({"layers": None, "**": q4}, {}, 1),
    ({("layers[0]", "**.norm1", "**.mlp"): None, "**": q4}, {"strict": False}, 7),
    # Rules.
    ({"layers[0].mlp": q8, "**": q4}, {"exclude": "layers[0]"}, 10),
    ({("**.mlp", "**.q_proj"): q8, "**": q4}, {}, 13),
    ({("**.mlp", "layers[1].mlp"): q8, "**": q4}, {}, 13),  # each matches one, and they decide one
    ({"layers[0].norm1": q8, "**": q4}, {"exclude": "layers[0]"}, 10),
]


@pytest.mark.parametrize("where", [nn.Linear, is_linear], ids=["a class", "a function"])
@pytest.mark.parametrize(("pattern", "options", "count"), QUIET)
def test_what_does_something_is_not_complained_about(pattern, options, count, where):
    arguments: Any = (pattern,) if isinstance(pattern, dict) else (pattern, q4)
    assert len(replace_layers(Model(), *arguments, where=where, **options)) == count


# ---------------------------------------------------------------- how often a function is asked


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
    (["head", "**.q_proj"], (), [*(f"layers.{n}.attention.q_proj" for n in range(4)), "head"]),
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
def test_a_function_is_asked_once_about_each_match(pattern, exclude, asked):
    where = Asked()
    select(Model(), pattern, where=where, exclude=exclude)
    assert where.paths == asked
    where = Asked()
    replace_layers(Model(), pattern, q4, where=where, exclude=exclude)
    assert where.paths == asked


def test_a_function_is_not_asked_about_an_excluded_module_if_nothing_is_judged():
    where = Asked()
    select(Model(), "**.mlp", where=where, exclude="layers[1:]", strict=False)
    assert where.paths == ["layers.0.mlp"]


def test_an_exception_of_where_about_an_excluded_module_counts_as_something():
    model = Model()

    def is_wide(path: str, module: Any) -> bool:
        return module.weight.shape[-1] > 1  # a Block has no weight

    with pytest.raises(AttributeError):
        select(model, "layers.0.**", where=is_wide)
    assert list(select(model, "layers.0.**", where=is_wide, exclude="layers[0].attention")) == [
        "layers.0.norm1",
        "layers.0.mlp",
    ]
    # There is an exception for all that is excluded.
    assert list(select(model, "layers.0.*", where=is_wide, exclude="layers[0].attention")) == [
        "layers.0.norm1",
        "layers.0.mlp",
    ]
    report = replace_layers(model, {"head": q8, "**": q4}, where=is_wide, exclude="layers")
    assert list(report) == ["embed", "head"]


def test_an_interrupt_of_where_is_not_an_answer():
    def interrupted(path: str, module: nn.Module) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        select(Model(), ["head", "embed"], where=interrupted, exclude="embed")


def test_a_suggestion_that_where_cannot_bear_is_left_out():
    def is_wide(path: str, module: Any) -> bool:
        return not isinstance(module, Block) and module.weight.shape[-1] > 1

    with pytest.raises(NoMatchError) as error:
        select(Model(), "layers.*", where=is_wide)
    assert (
        str(error.value) == "where=is_wide rejects all 4 modules that 'layers.*' matches: 4 Block"
    )


class Never:
    """A `where` without a name."""

    def __call__(self, path: str, module: nn.Module) -> bool:
        return False

    def __repr__(self) -> str:
        return "Never()"


def test_a_where_without_a_name_is_shown_as_python_shows_it():
    with pytest.raises(NoMatchError) as error:
        select(Model(), "head", where=Never())
    assert str(error.value) == "where=Never() rejects the only module that 'head' matches: Linear"


# ---------------------------------------------------------------- two classes of one name


class RMSNorm(nn.Module):
    """Not MLX's own, as in some models of mlx-lm."""


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = [RMSNorm(), RMSNorm()]
        self.own = nn.RMSNorm(2)
        self.head = nn.Linear(2, 2)


HERE = __name__
CLASSES = [
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
def test_two_classes_of_one_name_are_told_apart_by_their_modules(where, pattern, message):
    with pytest.raises(NoMatchError) as error:
        select(Norms(), pattern, where=where)
    assert str(error.value) == message


def test_the_norms_of_gemma2_are_not_those_of_mlx(needs):
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
