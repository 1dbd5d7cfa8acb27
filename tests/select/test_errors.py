"""Every error's full text: what was given, what was there, what would work."""

import re
from functools import partial
from string import ascii_lowercase
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_modswap import NoMatchError, SelectionError, partial_modules, replace_layers, select


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.v_proj = nn.Linear(4, 4)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = Attention()
        self.mlp = nn.Linear(4, 4)
        self.act = nn.gelu
        self.dropout = None


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = [Block() for _ in range(4)]
        self.pair = (nn.Linear(4, 4), nn.ReLU())
        self.sizes = [1, 2, 3]
        self.keyed: dict[Any, nn.Module] = {"0": nn.ReLU(), "1": nn.ReLU()}
        self.lm_head = nn.Linear(4, 8)


def identity(path: str, module: nn.Module) -> nn.Module:
    return nn.Identity()


def keep(path: str, module: nn.Module) -> nn.Module:
    return module


NO_MATCH = [
    # A path that is not the whole path.
    ("q_proj", "'q_proj' matches nothing; '**.q_proj' matches 4"),
    ("self_attn.*", "'self_attn.*' matches nothing; '**.self_attn.*' matches 8"),
    # A typo, or a level left out, in some segment.
    (
        "attn.q_proj",
        "'attn.q_proj' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'; "
        "'**.self_attn.q_proj' matches 4",
    ),
    (
        "layers.self_attn.q_proj",
        "'layers.self_attn.q_proj' matches nothing: 'layers' is a list of 4; "
        "'layers.**.self_attn.q_proj' matches 4",
    ),
    (
        "Layers.0.MLP",
        "'Layers.0.MLP' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'; "
        "'layers.0.mlp' matches 1",
    ),
    (
        "layers.0.self_attn.zzz",
        "'layers.0.self_attn.zzz' matches nothing: "
        "'layers.0.self_attn' holds '{q,v}_proj' (2 Linear)",
    ),
    ("layers.**.mpl", "'layers.**.mpl' matches nothing; 'layers.**.mlp' matches 4"),
    ("embed.**.zzz", "'embed.**.zzz' matches nothing"),
    ("layers.**.7", "'layers.**.7' matches nothing"),
    ("**.layers[7]", "'**.layers[7]' matches nothing; '**.layers[-1]' matches 1"),
    ("**.layers.7", "'**.layers.7' matches nothing; '**.layers[-1]' matches 1"),
    ("**.lm_head[0]", "'**.lm_head[0]' matches nothing"),
    (
        "layer[0].mpl",
        "'layer[0].mpl' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'; "
        "'layers[0].mlp' matches 1",
    ),
    (
        "layers[5].mpl",
        "'layers[5].mpl' matches nothing: 'layers' is a list of 4; 'layers[-1].mlp' matches 1",
    ),
    (
        "keyd",
        "'keyd' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'; "
        "'keyed.*' matches 2",
    ),
    (
        "siezs",
        "'siezs' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'",
    ),
    (
        "layer.*.self_attn.q_proj",
        "'layer.*.self_attn.q_proj' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'; "
        "'layers.*.self_attn.q_proj' matches 4",
    ),
    (
        "layer.*.q_proj",
        "'layer.*.q_proj' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'; "
        "'layers.*.**.q_proj' matches 4",
    ),
    (
        "layers.*.self_atn.{q,v}_proj",
        "'layers.*.self_atn.{q,v}_proj' matches nothing: 'layers.0' holds 'self_attn', 'mlp'; "
        "'layers.*.self_attn.{q,v}_proj' matches 8",
    ),
    ("**.q_prjo", "'**.q_prjo' matches nothing; '**.q_proj' matches 4"),
    (
        "LM_HEAD",
        "'LM_HEAD' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'; "
        "'lm_head' matches 1",
    ),
    (
        "zzz",
        "'zzz' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'",
    ),
    # An index that is not there.
    ("layers[99]", "'layers[99]' matches nothing: 'layers' is a list of 4; 'layers[-1]' matches 1"),
    ("layers[9:]", "'layers[9:]' matches nothing: 'layers' is a list of 4; 'layers[-1]' matches 1"),
    ("layers.7", "'layers.7' matches nothing: 'layers' is a list of 4; 'layers[-1]' matches 1"),
    ("keyed[0]", "'keyed[0]' matches nothing: 'keyed' is a dict, not a list; 'keyed.0' matches 1"),
    ("lm_head[0]", "'lm_head[0]' matches nothing: 'lm_head' is a module (Linear), not a list"),
    ("layers.mlp[0]", "'layers.mlp[0]' matches nothing: 'layers' is a list of 4"),
    ("layers[0][1]", "'layers[0][1]' matches nothing: 'layers.0' is a module (Block), not a list"),
    ("keyed.5", "'keyed.5' matches nothing: 'keyed' holds '{0,1}' (2 ReLU)"),
    ("keyed[1:]", "'keyed[1:]' matches nothing: 'keyed' is a dict, not a list"),
    (
        "zzz.0",
        "'zzz.0' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'",
    ),
    ("**.7", "'**.7' matches nothing"),
    # What is there is no module.
    ("layers", "'layers' matches nothing: it is a list of 4, not a module; 'layers.*' matches 4"),
    ("keyed", "'keyed' matches nothing: it is a dict, not a module; 'keyed.*' matches 2"),
    (
        "lm_head.weight",
        "'lm_head.weight' matches nothing: it is an array, not a module; 'lm_head' matches 1",
    ),
    (
        "layers.0.act",
        "'layers.0.act' matches nothing: it is a function, not a module; 'layers.0' matches 1",
    ),
    (
        "layers[0].dropout",
        "'layers[0].dropout' matches nothing: 'layers.0.dropout' is None, not a module; "
        "'layers[0]' matches 1",
    ),
    (
        "layers[1].self_attn.q_proj.weight",
        "'layers[1].self_attn.q_proj.weight' matches nothing: "
        "'layers.1.self_attn.q_proj.weight' is an array, not a module; "
        "'layers[1].self_attn.q_proj' matches 1",
    ),
    (
        "layers.*.act",
        "'layers.*.act' matches nothing: 'layers.0.act' is a function, not a module; "
        "'layers.*' matches 4",
    ),
    ("layers.0.act.x", "'layers.0.act.x' matches nothing: 'layers.0.act' holds no modules"),
    ("lm_head.0", "'lm_head.0' matches nothing: 'lm_head' holds no modules"),
    ("lm_head.wieght", "'lm_head.wieght' matches nothing: 'lm_head' holds no modules"),
    ("lm_head._training", "'lm_head._training' matches nothing: 'lm_head' holds no modules"),
    ("sizes", "'sizes' matches nothing: it is a list of 3, not a module"),
    ("sizes.0", "'sizes.0' matches nothing: it is an int, not a module"),
    ("sizes[1]", "'sizes[1]' matches nothing: 'sizes.1' is an int, not a module"),
    ("sizes[7]", "'sizes[7]' matches nothing: 'sizes' is a list of 3"),
    ("pair.2", "'pair.2' matches nothing: 'pair' is a tuple of 2"),
    ("pair[2]", "'pair[2]' matches nothing: 'pair' is a tuple of 2"),
    ("pair", "'pair' matches nothing: it is a tuple of 2, not a module"),
    (
        "pair.0",
        "'pair.0' matches nothing: it is in a tuple, and MLX sees modules in lists and dicts only",
    ),
    (
        "pair[1]",
        "'pair[1]' matches nothing: "
        "'pair.1' is in a tuple, and MLX sees modules in lists and dicts only",
    ),
    (
        "pair.0.weight",
        "'pair.0.weight' matches nothing: "
        "it is in a tuple, and MLX sees modules in lists and dicts only",
    ),
    ("**.act", "'**.act' matches nothing: 'layers.0.act' is a function, not a module"),
    (
        "lm_head.**",
        "'lm_head.**' matches nothing: 'lm_head' holds no modules; 'lm_head' matches 1",
    ),
    # Many segments, of which one could not be told so shortly.
    (
        39 * "a." + "a",
        "'" + 38 * "a." + "... matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'",
    ),
    (40 * "a." + "a", "'" + 38 * "a." + "... matches nothing"),
    # Regular expressions.
    (
        re.compile("q_proj"),
        "re.compile('q_proj') does not match any complete path (fullmatch); "
        're.compile(r"(.*\\.)?(q_proj)") matches 4',
    ),
    (
        re.compile("attn"),
        "re.compile('attn') does not match any complete path (fullmatch); "
        're.compile(r".*(attn).*") matches 12',
    ),
    (
        re.compile("ATTN", re.IGNORECASE),
        "re.compile('ATTN', re.IGNORECASE) does not match any complete path (fullmatch); "
        're.compile(r".*(ATTN).*", re.IGNORECASE) matches 12',
    ),
    (
        re.compile('q_proj"?'),
        "re.compile('q_proj\"?') does not match any complete path (fullmatch); "
        "re.compile('(.*\\\\.)?(q_proj\"?)') matches 4",
    ),
    (
        re.compile("q_proj\n?"),
        "re.compile('q_proj\\n?') does not match any complete path (fullmatch); "
        "re.compile('(.*\\\\.)?(q_proj\\n?)') matches 4",
    ),
    (re.compile("zzz"), "re.compile('zzz') does not match any complete path (fullmatch)"),
    (
        re.compile("(?i)Q_PROJ"),
        "re.compile('(?i)Q_PROJ', re.IGNORECASE) does not match any complete path (fullmatch); "
        're.compile(r"(.*\\.)?(Q_PROJ)", re.IGNORECASE) matches 4',
    ),
    (
        re.compile("Q_PROJ", re.IGNORECASE | re.DOTALL),
        "re.compile('Q_PROJ', re.IGNORECASE|re.DOTALL) "
        "does not match any complete path (fullmatch); "
        're.compile(r"(.*\\.)?(Q_PROJ)", re.IGNORECASE|re.DOTALL) matches 4',
    ),
    (
        re.compile("Q_PROJ", re.ASCII | re.IGNORECASE),
        "re.compile('Q_PROJ', re.IGNORECASE|re.ASCII) "
        "does not match any complete path (fullmatch); "
        're.compile(r"(.*\\.)?(Q_PROJ)", re.IGNORECASE|re.ASCII) matches 4',
    ),
    (
        re.compile("Q_PROJ", re.IGNORECASE | re.MULTILINE | re.VERBOSE),
        "re.compile('Q_PROJ', re.IGNORECASE|re.MULTILINE|re.VERBOSE) "
        "does not match any complete path (fullmatch); "
        're.compile(r"(.*\\.)?(Q_PROJ)", re.IGNORECASE|re.MULTILINE|re.VERBOSE) matches 4',
    ),
    (
        re.compile("(?x)zzz #"),
        "re.compile('(?x)zzz #', re.VERBOSE) does not match any complete path (fullmatch)",
    ),
    # No pattern at all.
    ([], "no pattern was given; '**' matches every module of the model"),
]


@pytest.mark.parametrize(("pattern", "message"), NO_MATCH, ids=[str(p) for p, _ in NO_MATCH])
def test_a_pattern_that_matches_nothing(pattern, message):
    model = Net()
    with pytest.raises(NoMatchError) as error:
        replace_layers(model, pattern, identity)
    assert str(error.value) == message
    with pytest.raises(NoMatchError) as error:
        select(model, pattern)
    assert str(error.value) == message
    assert not replace_layers(model, pattern, identity, strict=False)


@pytest.mark.parametrize("message", [message for _, message in NO_MATCH])
def test_the_suggestion_matches_as_many_as_it_says(message):
    found = re.search(r"; (re\.compile\(.*\)|'.*') matches (\d+)$", message)
    if found is None:
        assert "; " not in message or message.startswith("no pattern")
        return
    assert len(select(Net(), eval(found[1]))) == int(found[2])


@pytest.mark.parametrize(
    ("names", "more"),
    [("abcdefgh", ""), ("abcdefghi", " and 1 more"), (ascii_lowercase, " and 18 more")],
)
def test_of_many_modules_eight_are_named(names, more):
    model = nn.Module()
    for name in names:
        setattr(model, name, type(name.upper(), (nn.Module,), {})())
    with pytest.raises(NoMatchError) as error:
        select(model, "zzz")
    assert str(error.value) == (
        "'zzz' matches nothing: the model holds 'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'" + more
    )


OTHERS = [
    (
        {"pattern": "**.self_attn.*", "where": nn.Conv1d},
        "where=Conv1d rejects all 8 modules that '**.self_attn.*' matches: 8 Linear",
    ),
    (
        {"pattern": ["layers.*", "embed"], "where": (nn.Conv1d, nn.RMSNorm)},
        "where=(Conv1d, RMSNorm) rejects all 5 modules that 'layers.*', 'embed' match: 4 "
        "Block, 1 Embedding",
    ),
    (
        {"pattern": "**", "where": keep, "exclude": "lm_hed"},
        "exclude 'lm_hed' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'; "
        "'lm_head' matches 1",
    ),
    (
        {"pattern": "layers.*", "exclude": ["layers[0]", "lm_head"]},
        "exclude 'lm_head' has no effect: it matches 1 module, "
        "but none of the 4 matched by 'layers.*'",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), OTHERS)
def test_a_where_or_an_exclude_that_does_nothing(arguments, message):
    model = Net()
    with pytest.raises(NoMatchError) as error:
        select(model, **arguments)
    assert str(error.value) == message
    select(model, **arguments, strict=False)


RULES = [
    ({"q_proj": identity}, "'q_proj' matches nothing; '**.q_proj' matches 4"),
    ({}, "no pattern was given; '**' matches every module of the model"),
    (
        {"**.self_attn.*": keep, "**.q_proj": None},
        "rule '**.q_proj' never applies: earlier rules already match all 4 of its modules; "
        "remove it, or move it up",
    ),
    (
        {"layers[0].**": None, "layers[1:].**": keep, "layers.3.mlp": identity},
        "rule 'layers.3.mlp' never applies: earlier rules already match its only module; "
        "remove it, or move it up",
    ),
]


@pytest.mark.parametrize(("rules", "message"), RULES)
def test_a_rule_that_does_nothing(rules, message):
    model = Net()
    with pytest.raises(NoMatchError) as error:
        replace_layers(model, rules)
    assert str(error.value) == message
    assert not replace_layers(model, rules, strict=False)


def shared() -> Net:
    """A net with a tied embedding and two names for one list."""
    model = Net()
    model.tied = model.embed
    model.blocks = model.layers
    return model


SELECTIONS = [
    (
        "embed",
        "'embed' is tied to 'tied' (the same Embedding), which is not selected; "
        "select both, or neither (exclude='embed'); "
        "to untie them, use model.update_modules(partial_modules(model, {'embed': new}))",
    ),
    (
        "layers[0].mlp",
        "'layers.0.mlp' and 'blocks.0.mlp' are the same place, because a module or list that "
        "contains it is shared; select both paths, or neither (exclude='layers.0.mlp')",
    ),
    (
        {"embed": identity, "tied": identity},
        "'embed', 'tied' are the same Embedding, but different rules decide about them: "
        "'embed', 'tied'; let one rule match all of these paths first",
    ),
    (
        ["lm_head", "{layers,blocks}.0", "{layers,blocks}.0.mlp"],
        "'layers.0.mlp' lies inside 'layers.0', and both would change; "
        "exclude the inner one (exclude='layers.0.mlp'), or select only 'layers.0'",
    ),
]


@pytest.mark.parametrize(("pattern", "message"), SELECTIONS)
def test_a_selection_that_cannot_be_swapped(pattern, message):
    model = shared()
    arguments: Any = (pattern,) if isinstance(pattern, dict) else (pattern, identity)
    with pytest.raises(SelectionError) as error:
        replace_layers(model, *arguments)
    assert str(error.value) == message


def test_two_entries_that_print_the_same_path():
    model = Net()
    model.keyed[0] = nn.Tanh()
    message = (
        "2 places have the path 'keyed.0', as the keys 0 and '0' of one dict do; "
        "rename one of the keys"
    )
    with pytest.raises(SelectionError) as error:
        replace_layers(model, "keyed.0", identity)
    assert str(error.value) == message
    with pytest.raises(SelectionError) as error:
        partial_modules(model, {"keyed.0": nn.Tanh()})
    assert str(error.value) == message
    assert list(replace_layers(model, "keyed.1", identity)) == ["keyed.1"]


def test_a_key_with_a_dot_that_prints_the_path_of_another_place():
    model = nn.Module()
    model.keyed = {"a.b": nn.Tanh(), "a": {"b": nn.Tanh()}}
    with pytest.raises(SelectionError) as error:
        replace_layers(model, "keyed.a.b", identity)
    assert str(error.value) == (
        "2 places have the path 'keyed.a.b', as the keys 0 and '0' of one dict do; "
        "rename one of the keys"
    )


def test_two_paths_that_are_equal_although_every_key_has_a_dot():
    model = nn.Module()
    dict.update(model, {"a.b": {"c.d": nn.Tanh()}, "a.b.c.d": nn.Tanh()})
    with pytest.raises(SelectionError) as error:
        replace_layers(model, "a.b.c.d", identity)
    assert str(error.value) == (
        "2 places have the path 'a.b.c.d', as the keys 0 and '0' of one dict do; "
        "rename one of the keys"
    )


def cycle() -> nn.Module:
    model = Net()
    model.layers[1].self_attn.back = model.layers
    return model


@pytest.mark.parametrize(
    "call", [select, lambda model, pattern: replace_layers(model, pattern, identity)]
)
def test_a_model_that_holds_a_cycle(call):
    with pytest.raises(SelectionError) as error:
        call(cycle(), "**")
    assert str(error.value) == (
        "the model contains a cycle: 'layers.1.self_attn.back' is 'layers' again"
    )
    model = Net()
    model.lm_head.top = model
    with pytest.raises(SelectionError) as error:
        call(model, "**")
    assert str(error.value) == "the model contains a cycle: 'lm_head.top' is the model itself again"


def test_a_narrow_look_does_not_come_to_a_cycle():
    model = cycle()
    assert list(select(model, "layers.0.mlp")) == ["layers.0.mlp"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "layers.9",
            "'layers.9' matches nothing: 'layers' is a list of 4; 'layers[-1]' matches 1",
        ),
        (
            "layers.0.mpl",
            "'layers.0.mpl' matches nothing: 'layers.0' holds 'self_attn', 'mlp'; "
            "'layers.0.mlp' matches 1",
        ),
        (
            "zzz",
            "'zzz' matches nothing: "
            "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'",
        ),
    ],
)
def test_a_narrow_pattern_that_matches_nothing_in_a_model_with_a_cycle(pattern, message):
    with pytest.raises(NoMatchError) as error:
        select(cycle(), pattern)
    assert str(error.value) == message


def test_the_model_in_a_tuple_of_its_layer_is_no_cycle():
    model = nn.Module()
    model.attn = Attention()
    model.attn.owner = (model,)
    with pytest.raises(NoMatchError) as error:
        select(model, "v_prjo")
    assert str(error.value) == (
        "'v_prjo' matches nothing: the model holds 'attn'; '**.v_proj' matches 1"
    )


def test_a_list_that_is_called_is_a_list():
    class Chain(list[nn.Module]):
        def __call__(self, x: Any) -> Any:
            return x

    model = nn.Module()
    model.layers = Chain([nn.ReLU(), nn.Tanh()])
    with pytest.raises(NoMatchError) as error:
        select(model, "layers[7]")
    assert str(error.value) == (
        "'layers[7]' matches nothing: 'layers' is a Chain of 2; 'layers[-1]' matches 1"
    )


@pytest.mark.parametrize("base", [list, tuple])
def test_a_list_with_a_length_of_its_own_is_not_asked_for_it(base):
    class Odd(base):
        def __len__(self):
            raise AssertionError("what is no module is described without its own methods")

    with pytest.raises(TypeError) as error:
        select(Odd([nn.ReLU()]), "**")
    assert str(error.value) == "model must be an mlx.nn.Module, not an Odd of 1"


def test_a_name_is_looked_for_among_thousands():
    model = nn.Module()
    model.wide, model.last = nn.Module(), nn.Module()
    for number in range(2000):
        setattr(model.wide, f"n{number}", nn.Module())
    model.last.target = nn.ReLU()
    with pytest.raises(NoMatchError) as error:
        select(model, "tarqet")
    assert str(error.value) == (
        "'tarqet' matches nothing: the model holds '{wide,last}' (2 Module); '**.target' matches 1"
    )


@pytest.mark.parametrize("typo", ["y" + 99 * "x", "y" + 100 * "x"], ids=["100", "101"])
def test_a_name_of_100_characters_is_suggested_in_full(typo):
    model = nn.Module()
    setattr(model, 100 * "x", nn.ReLU())
    with pytest.raises(NoMatchError) as error:
        select(model, typo)
    assert str(error.value) == (
        f"'y{75 * 'x'}... matches nothing: the model holds '{100 * 'x'}'; '{100 * 'x'}' matches 1"
    )


def test_a_name_that_comes_after_a_tied_module_is_suggested():
    model = nn.Module()
    model.first = model.again = nn.Linear(4, 4)
    model.block = Block()
    with pytest.raises(NoMatchError) as error:
        select(model, "q_prjo")
    assert str(error.value) == (
        "'q_prjo' matches nothing: the model holds '{first,again}' (2 Linear), 'block'; "
        "'**.q_proj' matches 1"
    )


def test_an_exclude_beside_the_only_match_is_told_so():
    with pytest.raises(NoMatchError) as error:
        select(nn.Sequential(nn.ReLU(), nn.Tanh()), "layers.0", exclude="layers.1")
    assert str(error.value) == (
        "exclude 'layers.1' has no effect: it matches 1 module, but not the one matched by "
        "'layers.0'"
    )


@pytest.mark.parametrize("pattern", ["*", "**"])
def test_a_model_without_modules_is_named_as_the_model(pattern):
    with pytest.raises(NoMatchError) as error:
        select(nn.ReLU(), pattern)
    assert str(error.value) == f"'{pattern}' matches nothing: the model holds no modules"


def test_a_factory_that_would_make_a_cycle():
    model = Net()
    with pytest.raises(SelectionError) as error:
        replace_layers(model, "lm_head", lambda path, layer: nn.Sequential(layer, model))
    assert str(error.value) == (
        "the model contains a cycle: 'lm_head.layers.1' is the model itself again"
    )


def test_a_factory_that_would_make_a_cycle_and_hands_on_the_layer_further_down():
    model = Net()
    with pytest.raises(SelectionError) as error:
        replace_layers(
            model, "lm_head", lambda path, layer: nn.Sequential(model, nn.Sequential(layer))
        )
    assert str(error.value) == (
        "the model contains a cycle: 'lm_head.layers.0' is the model itself again"
    )


PARTIALS = [
    ({"zzz": nn.ReLU()}, NoMatchError, "there is no module at 'zzz': the model holds 'embed', "
     "'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'"),
    ({"layers.9": nn.ReLU()}, NoMatchError,
     "there is no module at 'layers.9': 'layers' is a list of 4"),
    ({"lm_head.weight": nn.ReLU()}, NoMatchError,
     "there is no module at 'lm_head.weight': it is an array, not a module"),
    ({"layers.*": nn.ReLU()}, NoMatchError, "there is no module at 'layers.*'"),
    ({"layers[0]": nn.ReLU()}, NoMatchError, "there is no module at 'layers[0]'"),
    ({"": nn.ReLU()}, NoMatchError, "there is no module at ''"),
    ({".embed": nn.ReLU()}, NoMatchError, "there is no module at '.embed'"),
    ({"embed.": nn.ReLU()}, NoMatchError, "there is no module at 'embed.'"),
    ({"layers..0": nn.ReLU()}, NoMatchError, "there is no module at 'layers..0'"),
    ({"{embed}": nn.ReLU()}, NoMatchError, "there is no module at '{embed}'"),
    ({"embe?": nn.ReLU()}, NoMatchError, "there is no module at 'embe?'"),
    ({39 * "a." + "a": nn.ReLU()}, NoMatchError,
     "there is no module at '" + 38 * "a." + "...: the model holds 'embed', "
     "'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'"),
    ({40 * "a." + "a": nn.ReLU()}, NoMatchError, "there is no module at '" + 38 * "a." + "..."),
    ({"layers.0.mlp": nn.ReLU(), "layers.0": nn.ReLU()}, SelectionError,
     "'layers.0.mlp' lies inside 'layers.0', and both are given; leave one of them out"),
    ({"embed": nn.ReLU}, TypeError, "'embed' needs an mlx.nn.Module, not the class ReLU"),
    ({3: nn.ReLU()}, TypeError, "a path is a str, not an int"),
    (["embed"], TypeError, "modules must map paths to modules, not a list of 1"),
]  # fmt: skip


@pytest.mark.parametrize(("modules", "error_class", "message"), PARTIALS)
def test_a_partial_dict_that_cannot_be_built(modules, error_class, message):
    with pytest.raises(error_class) as error:
        partial_modules(Net(), modules)
    assert str(error.value) == message


class Odd:
    """Of a class whose name begins with a vowel."""


BAD_ARGUMENTS = [
    ((3, "embed", identity), "model must be an mlx.nn.Module, not an int"),
    ((nn.Linear, "embed", identity), "model must be an mlx.nn.Module, not the class Linear"),
    ((mx.zeros(1), "embed", identity), "model must be an mlx.nn.Module, not an array"),
    ((Odd(), "embed", identity), "model must be an mlx.nn.Module, not an Odd"),
    (((1, 2), "embed", identity), "model must be an mlx.nn.Module, not a tuple of 2"),
    (([Net()], "embed", identity), "model must be an mlx.nn.Module, not a list of 1"),
    ((Net(), "embed"), "factory must be a function of path and module, not None"),
    (
        (Net(), "embed", nn.ReLU()),
        "factory must be a function of path and module, not a module (ReLU)",
    ),
    ((Net(), "embed", 3), "factory must be a function of path and module, not an int"),
    (
        (Net(), {"embed": nn.ReLU()}),
        "the factory of rule 'embed' must be a function of path and module, not a module (ReLU)",
    ),
    (
        (Net(), {"embed": identity}, identity),
        "rules hold their own factories: leave the factory out",
    ),
    ((Net(), nn.ReLU(), identity), "pattern must be a path pattern, not a module (ReLU)"),
    (
        (Net(), "embed", lambda path, layer: None),
        "the factory returned None for 'embed' (Embedding); it must return an mlx.nn.Module; "
        "return the module it was given to leave it unchanged",
    ),
    (
        (Net(), "embed", lambda path, layer: nn.Linear),
        "the factory returned the class Linear for 'embed' (Embedding); "
        "it must return an mlx.nn.Module; return the module it was given to leave it unchanged",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": nn.ReLU()}, "pattern must be a path pattern, not a module (ReLU)"),
        (
            {"pattern": "embed", "exclude": mx.array(1)},
            "exclude must be a path pattern, not an array",
        ),
    ],
)
def test_what_is_no_pattern_has_the_name_of_its_argument(arguments, message):
    for look in (select, partial(replace_layers, factory=identity)):
        with pytest.raises(TypeError) as error:
            look(Net(), **arguments)
        assert str(error.value) == message


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_a_bad_argument(arguments, message):
    with pytest.raises(TypeError) as error:
        replace_layers(*arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("where", "what"),
    [(3, "an int"), ((nn.Linear, 3), "a tuple of 2"), (nn.ReLU(), "a module (ReLU)")],
)
def test_a_bad_where(where, what):
    with pytest.raises(TypeError) as error:
        select(Net(), "**", where=where)
    assert str(error.value) == (
        f"where must be a class, a tuple of classes or a function of path and module, not {what}"
    )


def test_an_error_of_a_factory_names_the_place():
    def fail(path, layer):
        raise KeyError("rank")

    with pytest.raises(KeyError) as error:
        replace_layers(Net(), "lm_head", fail)
    assert error.value.__notes__ == ["while replacing 'lm_head' (Linear)"]


class Indexed(nn.Module):
    """A module that looks like a list, through which MLX cannot reach its children."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(4, 4)]

    def __getitem__(self, index):
        return self.layers[index]


def test_a_place_that_update_modules_cannot_reach():
    model = nn.Sequential(nn.Linear(4, 4), Indexed())
    first = model.layers[0]
    with pytest.raises(SelectionError) as error:
        replace_layers(model, "**", identity, where=nn.Linear)
    assert str(error.value) == (
        "MLX's update_modules failed, and nothing was changed: "
        "list indices must be integers or slices, not str"
    )
    assert model.layers[0] is first
