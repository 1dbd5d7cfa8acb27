"""What an error proposes for text in the habits of other languages and libraries."""

from __future__ import annotations

import re
import sys
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.nn as nn
import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st
from oracle import Segment, proposed_by
from strategies import USUAL, models, one_place, random_patterns, weighted

from mlx_modswap import NoMatchError, PatternError, capture, replace_layers, select, tree


def module(**children: Any) -> nn.Module:
    new = nn.Module()
    for name, child in children.items():
        setattr(new, name, child)
    return new


def linears(names: str) -> nn.Module:
    return module(**{name: nn.Linear(2, 2) for name in names.split()})


def block() -> nn.Module:
    return module(
        self_attn=linears("q_proj k_proj v_proj o_proj"),
        mlp=linears("gate_proj up_proj down_proj"),
        norm=nn.RMSNorm(2),
    )


def llama() -> nn.Module:
    inner = module(
        embed_tokens=nn.Embedding(2, 2),
        layers=[block() for _ in range(12)],
        keyed={"gate": nn.ReLU(), "main": nn.ReLU()},
    )
    return module(model=inner, lm_head=nn.Linear(2, 2))


# ---------------------------------------------------------------- text that is not a pattern

REFUSED = [
    # Ranges and choices of entries.
    ("model.layers.[0-3].mlp", "[0-3] is not a valid index or slice", "'model.layers[0:4].mlp'"),
    ("model.layers[0-3].mlp", "[0-3] is not a valid index or slice", "'model.layers[0:4].mlp'"),
    ("model.layers[0..3].mlp", "unmatched '['", "'model.layers[0:4].mlp'"),
    ("model.layers[3-0]", "[3-0] is not a valid index or slice", "'model.layers[0:4]'"),
    ("model.layers.{0..3}.mlp", "unmatched '{' in this segment", "'model.layers[0:4].mlp'"),
    ("model.layers.0..3.mlp", "a segment is empty", "'model.layers[0:4].mlp'"),
    ("model.layers[0,3]", "[0,3] is not a valid index or slice", "'model.layers.{0,3}'"),
    ("model.layers[ 0 : 2 ]", "[ 0 : 2 ] is not a valid index or slice", "'model.layers[0:2]'"),
    ("model.layers.[0:2]", "an index must follow the name of a list", "'model.layers[0:2]'"),
    ("model.layers.[-1].mlp", "an index must follow the name of a list", "'model.layers[-1].mlp'"),
    ("model.layers[0]mlp", "an index must end its segment", "'model.layers[0].mlp'"),
    ("model.layers[0.mlp", "unmatched '['", "'model.layers[0].mlp'"),
    # Characters of a glob.
    ("**.[qk]_proj", "[qk] is not a valid index or slice", "'**.{q,k}_proj'"),
    ("**.[a-z]_proj", "[a-z] is not a valid index or slice", "'**.?_proj'"),
    ("**.g[ao]te_proj", "[ao] is not a valid index or slice", "'**.g{a,o}te_proj'"),
    ("model.layers.[0-9]*", "[0-9] is not a valid index or slice", "'model.layers.?*'"),
    ("model.layers.[01][0-9]", "[0-9] is not a valid index or slice", "'model.layers.{0,1}?'"),
    # Whatever entry: JSONPath, f-strings, str.format.
    ("model.layers[*].mlp", "[*] is not a valid index or slice", "'model.layers.*.mlp'"),
    ("model.layers[].mlp", "[] is not a valid index or slice", "'model.layers.*.mlp'"),
    ("model.layers[i].mlp", "[i] is not a valid index or slice", "'model.layers.*.mlp'"),
    ("model.layers.{}.mlp", "braces without alternatives", "'model.layers.*.mlp'"),
    ("model.keyed['gate']", "['gate'] is not a valid index or slice", "'model.keyed.gate'"),
    # Two stars.
    ("**/q_proj", "'**' must be a segment of its own", "'**.q_proj'"),
    ("**q_proj", "'**' must be a segment of its own", "'**.q_proj'"),
    ("**.q**j", "'**' must be a segment of its own", "'**.q*j'"),
    ("**_proj", "'**' must be a segment of its own", "'**.*_proj'"),
    ("model.layers**", "'**' must be a segment of its own", "'model.layers.**'"),
    ("**[0]", "'**' must be a segment of its own", "'**.*[0]'"),
    ("**.[0]", "an index must follow the name of a list", "'**.*[0]'"),
    # Braces.
    ("**.{q_proj,norm", "unmatched '{' in this segment", "'**.{q_proj,norm}'"),
    ("**.{q,k}}_proj", "unmatched '}'", "'**.{q,k}_proj'"),
    ("**.{mlp.up_proj,norm}", "unmatched '{' in this segment", "['**.mlp.up_proj', '**.norm']"),
    ("**.{q,{k,v}}_proj", "braces cannot be nested", "['**.q_proj', '**.k_proj', '**.v_proj']"),
    # Dots too many.
    (".q_proj", "a segment is empty", "'**.q_proj'"),
    ("model.layers.0.", "a segment is empty", "'model.layers.0'"),
    ("model..layers.0", "a segment is empty", "'model.layers.0'"),
    # Several patterns in one text.
    (
        "model.layers[0-1], lm_head",
        "[0-1] is not a valid index or slice",
        "['model.layers[0:2]', 'lm_head']",
    ),
    *(
        (text, "'**' must be a segment of its own", "['**.up_proj', '**.down_proj']")
        for text in (
            "**.up_proj, **.down_proj",
            "**.up_proj,**.down_proj",
            "**.up_proj **.down_proj",
            "**.up_proj|**.down_proj",
            "{**.up_proj,**.down_proj}",
            "up_proj, **.down_proj",
        )
    ),
    # Regular expressions.
    (".*q_proj", "a segment is empty", 're.compile(r".*q_proj")'),
    (r".*\.(q|v)_proj", "a segment is empty", r're.compile(r".*\.(q|v)_proj")'),
    (
        "model.layers.[0-9]+.mlp",
        "[0-9] is not a valid index or slice",
        're.compile(r"model.layers.[0-9]+.mlp")',
    ),
    (
        r"model\.layers\.[^0]\.mlp",
        "[^0] is not a valid index or slice",
        r're.compile(r"model\.layers\.[^0]\.mlp")',
    ),
    ("**.[0-3].*.(q|v)_proj", "[0-3] is not a valid index or slice", "'**.*[0:4].*.{q,v}_proj'"),
    (r"**.\d+.*.[qk]_proj", "[qk] is not a valid index or slice", "'**.*.*.{q,k}_proj'"),
]


@pytest.mark.parametrize(("text", "reason", "proposed"), REFUSED, ids=[row[0] for row in REFUSED])
def test_an_error_of_a_pattern_proposes_what_was_meant(text, reason, proposed):
    with pytest.raises(PatternError) as error:
        select(llama(), text)
    write = "for a regular expression write" if proposed.startswith("re.") else "write"
    assert str(error.value).split("\n")[0] == f"{reason}; {write} {proposed}"
    assert select(llama(), eval(proposed))
    assert proposed_by(error.value) == [(eval(proposed), None)]


# ---------------------------------------------------------------- text that matches nothing

MATCHES_NOTHING = [
    # Regular expressions.
    (r"model\.layers\.\d+\.mlp", r'; re.compile(r"model\.layers\.\d+\.mlp") matches 12'),
    ("model.layers.(0|1).mlp", "; 'model.layers.{0,1}.mlp' matches 2"),
    ("model.layers.*.mlp.(up|down)_proj", "; 'model.layers.*.mlp.{up,down}_proj' matches 24"),
    ("model.layers.*.(up|down)_proj", '; re.compile(r"model.layers.*.(up|down)_proj") matches 24'),
    ("(?:up|down)_proj", "; '**.{up,down}_proj' matches 24"),
    ("(mlp.up_proj|norm)", "; ['**.mlp.up_proj', '**.norm'] matches 24"),
    ("^model.layers.0.mlp$", '; re.compile(r"^model.layers.0.mlp$") matches 1'),
    ("^model.layers.0", '; re.compile(r"^model.layers.0") matches 1'),
    ("norm$", r'; re.compile(r"(.*\.)?(norm)") matches 12'),
    ("^norm", r'; re.compile(r"(.*\.)?(norm)") matches 12'),
    ("(?i).*NORM", '; re.compile(r"(?i).*NORM") matches 12'),
    ("(?i)NORM", r'; re.compile(r"(.*\.)?(NORM)", re.IGNORECASE) matches 12'),
    ("re:.*norm", '; re.compile(r".*norm") matches 12'),
    (r"model.layers.\d+.norm", r'; re.compile(r"model.layers.\d+.norm") matches 12'),
    (r"**.layers\.0\.norm", "; '**.layers.0.norm' matches 1"),
    (r"**.layers.\d+.norm", "; '**.layers.*.norm' matches 12"),
    # Globs, of which a star goes through dots.
    ("*.norm", "; '**.*.norm' matches 12"),
    ("*_proj", "; '**.*_proj' matches 84"),
    ("model/layers/*/norm", "; 'model.layers.*.norm' matches 12"),
    # Ranges and choices of entries.
    ("layers.0-3", "; '**.layers[0:4]' matches 4"),
    ("layers.{0-3}", "; '**.layers[0:4]' matches 4"),
    ("layers.0:3", "; '**.layers[0:3]' matches 3"),
    ("layers.{:3}", "; '**.layers[:3]' matches 3"),
    ("layers.-1", "; '**.layers[-1]' matches 1"),
    ("layers{0,3}", "; '**.layers.{0,3}' matches 2"),
    # Whatever entry.
    ("model.layers.%d.norm", "; 'model.layers.*.norm' matches 12"),
    ("model.layers.{i}.norm", "; 'model.layers.*.norm' matches 12"),
    ("model.layers.<i>.norm", "; 'model.layers.*.norm' matches 12"),
    ("model.layers.$i.norm", "; 'model.layers.*.norm' matches 12"),
    (
        "model.layers.N.norm",
        ": 'model.layers' is a list of 12; 'model.layers.*.norm' matches 12",
    ),
    # Several patterns in one text, quotes, blanks.
    ("up_proj,norm", "; ['**.up_proj', '**.norm'] matches 24"),
    ("up_proj | norm", "; ['**.up_proj', '**.norm'] matches 24"),
    ("'lm_head' ", "; 'lm_head' matches 1"),
    ("norm,", "; '**.norm' matches 12"),
    ("up_proj,nowhere", ": the model holds 'model', 'lm_head'"),  # select would refuse the two
    # More than one of these.
    ("layers/0-3/(up|down)_prjo", ": the model holds 'model', 'lm_head'"),
    ("layers/0-3/mlp/(up|down)_proj", "; '**.layers[0:4].mlp.{up,down}_proj' matches 8"),
    ("layers/0-3/mlpp", ": the model holds 'model', 'lm_head'; '**.layers[0:4].mlp' matches 4"),
    # The beginning of another model's paths.
    (
        "language_model.model.layers.0.mlp",
        ": the model holds 'model', 'lm_head'; '**.model.layers.0.mlp' matches 1",
    ),
    (
        "transformer.layers[0].mlp",
        ": the model holds 'model', 'lm_head'; '**.layers[0].mlp' matches 1",
    ),
    ("transformer.h.0.norm", ": the model holds 'model', 'lm_head'; '**.norm' matches 12"),
    ("transformer.h.0", ": the model holds 'model', 'lm_head'"),
]


@pytest.mark.parametrize(("text", "told"), MATCHES_NOTHING, ids=[row[0] for row in MATCHES_NOTHING])
def test_an_error_of_a_pattern_that_matches_nothing_proposes_what_was_meant(text, told):
    with pytest.raises(NoMatchError) as error:
        select(llama(), text)
    assert str(error.value) == f"{text!r} matches nothing{told}"
    proposed = proposed_by(error.value)
    assert len(proposed) == (" matches " in told)
    assert all(len(select(llama(), one)) == number for one, number in proposed)


def test_a_text_of_up_to_200_characters_is_corrected():
    for length, proposed in ((200, [("lm_head", 1)]), (201, [])):
        with pytest.raises(NoMatchError) as error:
            select(llama(), "lm_head".ljust(length))
        assert proposed_by(error.value) == proposed


@pytest.mark.parametrize(("names", "are_expanded"), [("abcdefgh", True), ("abcdefghi", False)])
def test_nested_braces_with_up_to_7_commas_are_expanded(names, are_expanded):
    model = module(inner=linears(" ".join(names)))
    with pytest.raises(PatternError) as error:
        select(model, f"inner.{{{names[0]},{{{','.join(names[1:])}}}}}")
    expanded = [f"inner.{name}" for name in names]
    assert (f"; write {expanded}" in str(error.value)) == are_expanded


def test_a_regex_that_is_too_deep_to_be_widened_matches_nothing_like_any_other():
    def nested(depth: int) -> str:
        return "(" * depth + "lm_head_" + ")" * depth

    def is_too_deep(depth: int) -> bool:
        try:
            re.compile(nested(depth))
        except RecursionError:
            return True
        return False

    limit = bisect_left(range(sys.getrecursionlimit()), True, key=is_too_deep)
    deepest = re.compile(nested(limit - 1))
    with pytest.raises(NoMatchError, match=r"does not match any complete path \(fullmatch\)$"):
        select(llama(), deepest)


@pytest.mark.parametrize(
    ("name", "text", "proposed"),
    [
        ("price$", r"price\$", r're.compile(r"(.*\.)?(price\$)")'),
        ("back\\", r"\w*\.back\\", r're.compile(r"\w*\.back\\")'),
    ],
)
def test_a_regex_that_is_proposed_may_end_in_an_escaped_character(name, text, proposed):
    model = module(keyed={name: nn.ReLU()})
    with pytest.raises(NoMatchError) as error:
        select(model, text)
    assert str(error.value).endswith(f"; {proposed} matches 1")
    assert list(select(model, eval(proposed))) == [f"keyed.{name}"]


def test_a_place_below_another_prefix_is_proposed():
    tower = module(blocks=[block()])
    language_model = module(model=module(layers=[block(), block()]))
    model = module(vision_tower=tower, language_model=language_model)
    with pytest.raises(NoMatchError) as error:
        select(model, "model.language_model.layers.0.mlp.up_proj")
    assert str(error.value) == (
        "'model.language_model.layers.0.mlp.up_proj' matches nothing: "
        "the model holds '{vision_tower,language_model}' (2 Module); "
        "'language_model.model.layers.0.mlp.up_proj' matches 1"
    )


@pytest.mark.parametrize(
    "text",
    [
        r"(\w+\.)+norm",  # what repeats a repetition may take exponential time
        r".*.*\.norm",
        r".*a.*b.*c.*d.*e.*f.*norm",
        r"[[a]\.norm",  # Python warns of this one
        r"[a--b]\.norm",
        r"x\.(?i)norm",  # and some Pythons of this one
        r"(norm\.",  # no regular expression after all
        r"x{99999999999}\.norm",
    ],
)
def test_a_regex_that_is_slow_or_disputed_or_wrong_is_not_tried(text):
    with pytest.raises((PatternError, NoMatchError)) as error:
        select(llama(), text)
    assert "re.compile" not in str(error.value)


TRIED = [
    ("[qk]_proj", "[qk] is not a valid index or slice; write '**.{q,k}_proj'"),
    ("layers.[0-3]", "[0-3] is not a valid index or slice; write '**.layers[0:4]'"),
    (r"**.\d+.[qk]", "[qk] is not a valid index or slice; write '**.*.{q,k}'"),
    ("layers.[0-9]x", "[0-9] is not a valid index or slice; write 'layers.?x'"),
    (
        ".*layers",
        'a segment is empty; for a regular expression write re.compile(r".*(.*layers).*")',
    ),
]


@pytest.mark.parametrize(("text", "message"), TRIED)
def test_what_an_error_of_a_pattern_proposes_is_tried_on_the_model(text, message):
    calls: list[Callable[..., Any]] = [
        select,
        tree,
        partial(replace_layers, factory=keep),
        lambda *given, **options: capture(*given, **options).__enter__(),
    ]
    for call in calls:
        with pytest.raises(PatternError) as error:
            call(llama(), text)
        assert str(error.value).split("\n")[0] == message
        with pytest.raises(PatternError) as error:
            call(llama(), "**", exclude=text)
        assert str(error.value).split("\n")[0] == message
    with pytest.raises(PatternError) as error:
        replace_layers(llama(), {"lm_head": keep, text: None})
    assert str(error.value).split("\n")[0] == message


def keep(path: str, layer: nn.Module) -> nn.Module:
    return layer


# ---------------------------------------------------------------- names

PROJECTIONS = "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_norm o_proj"


@pytest.mark.parametrize(
    ("names", "name", "meant"),
    [
        # A misspelling.
        ("q_proj k_proj", "q_prjo", "q_proj"),
        ("q_proj k_proj", "qproj", "q_proj"),
        ("q_proj k_proj", "Q_Proj", "q_proj"),
        ("gate_proj up_proj", "gate-proj", "gate_proj"),
        ("q_proje " + " ".join(f"k{n}_projection" for n in range(9)), "q_projection", "q_proje"),
        ("self_attn mlp", "self_attention", "self_attn"),
        # A word more or less.
        ("self_attn mlp", "attn", "self_attn"),
        ("attn mlp", "self_attn", "attn"),
        # Another layer of the same kind.
        (PROJECTIONS, "kv_b_proj", None),
        ("q_proj v_proj", "k_proj", None),
        ("fc1 fc2", "fc3", None),
        ("fc1", "fc2", None),
        ("gate_proj down_proj", "up_proj", None),
        # As close to two as to each.
        ("gate_proj up_proj", "gate_up_proj", None),
        ("self_attn cross_attn", "attn", None),
    ],
)
def test_a_name_is_proposed_if_it_alone_may_have_been_meant(names, name, meant):
    model = linears(names)
    with pytest.raises(NoMatchError) as error:
        select(model, name)
    proposed = proposed_by(error.value)
    assert proposed == ([(meant, 1)] if meant else [])
    assert (f"; {meant!r} matches 1" in str(error.value)) == bool(meant)


def test_a_missing_layer_is_told_what_is_there_and_not_another_layer():
    model = module(layers=[module(self_attn=linears(PROJECTIONS))])
    with pytest.raises(NoMatchError) as error:
        select(model, "layers.0.self_attn.kv_b_proj")
    assert str(error.value) == (
        "'layers.0.self_attn.kv_b_proj' matches nothing: 'layers.0.self_attn' holds "
        "'{q_a_proj,q_b_proj,kv_a_proj_with_mqa}' (3 Linear), '{kv_b_norm,o_proj}' (2 Linear)"
    )


# ---------------------------------------------------------------- any text, any model

HABITS = [".*", "[qk]", "[0-3]", "(a|b)", "{0..3}", "{i}", "%d", "[i]", "[*]", "a..b", r"\d+", "**"]
SIGNS = [
    ".",
    ".",
    ".",
    "/",
    "*",
    "[",
    "]",
    "{",
    "}",
    "(",
    ")",
    ",",
    " ",
    "^",
    "$",
    "\\",
    "|",
    "!",
    "'",
]
JUMBLES = st.lists(st.sampled_from([*HABITS, *SIGNS, *USUAL, "0", "1"]), max_size=8).map("".join)


@st.composite
def habits(draw: st.DrawFn, model: nn.Module) -> str:
    """The path of a place, with some of its segments or dots in another language."""
    segments = draw(one_place(model).map(lambda place: place.path)).split(".")
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(segments) - 1))
        segments[at] = draw(st.sampled_from(HABITS))
    dot = draw(st.sampled_from([".", ".", "/", r"\."]))
    start, end = (
        draw(st.sampled_from(["", "", ".*", "^", "re:", "**"])),
        draw(st.sampled_from(["", "", "$", ".*", "."])),
    )
    return start + dot.join(segments) + end


@given(st.data())
def test_whatever_an_error_proposes_is_taken_by_select(data):
    model = data.draw(models())
    kinds = [habits(model), JUMBLES, st.text(max_size=12), random_patterns()]
    text = data.draw(weighted(dict.fromkeys(kinds, 1)))
    try:
        select(model, text)
    except PatternError as error:
        proposed = proposed_by(error)
        event(f"not a pattern, {len(proposed)} proposed")
        for pattern, number in proposed:
            assert number is None
            select(model, pattern, strict=False)
    except NoMatchError as error:
        proposed = proposed_by(error)
        event(f"matches nothing, {len(proposed)} proposed")
        for pattern, number in proposed:
            assert len(select(model, pattern)) == number
    else:
        event("matches")


Elsewhere = Callable[[list[Segment], int], str]


def a_name(change: str) -> Elsewhere:
    """One segment of the path in another language."""
    return lambda segments, at: ".".join(
        change.format(name=text, first=text[0], rest=text[1:]) if number == at else text
        for number, text in enumerate(segment.text for segment in segments)
    )


def the_end(change: str) -> Elsewhere:
    """The last segment alone."""
    return lambda segments, at: change.format(segments[-1].text)


def the_path(change: Callable[[str], str]) -> Elsewhere:
    """The whole path in another language."""
    return lambda segments, at: change(".".join(segment.text for segment in segments))


def the_entries(change: str) -> Elsewhere:
    """The entries of lists in another language."""
    return lambda segments, at: "".join(
        change.format(one.index) if one.index >= 0 else f".{one.text}" for one in segments
    ).removeprefix(".")


ELSEWHERE = {
    "slashes": the_path(lambda path: path.replace(".", "/")),
    "a glob": the_end("**/{}"),
    "a character of a glob": a_name("[{first}x]{rest}"),
    "an escaped regex": the_path(re.escape),
    "a regex with anchors": the_path("^{}$".format),
    "a regex of the last name": the_end(".*{}"),
    "a regex of compressed-tensors": the_end("re:.*{}"),
    "a regex with alternatives": a_name("(nowhere|{name})"),
    "a regex with digits": the_entries(r".\d+"),
    "braces around dots": the_path(lambda path: f"{{{path},{path}.nowhere}}"),
    "an f-string": a_name("{{i}}"),
    "str.format": a_name("{{}}"),
    "printf": a_name("%s"),
    "JSONPath": the_path(lambda path: re.sub(r"\.(\w+)$", r"['\1']", path)),
    "str.endswith": the_end(".{}"),
    "str.startswith": the_path("{}.".format),
    "another model": the_path("nowhere.{}".format),
    "an index after a dot": the_entries(".[{}]"),
    "a range": the_entries(".[0-{}]"),
    "a range without brackets": the_entries(".0-{}"),
    "a range of a shell": the_entries(".{{0..{}}}"),
}


@given(st.data())
def test_a_path_in_another_language_is_answered_with_a_pattern_that_finds_it(data):
    model = data.draw(models())
    place = data.draw(one_place(model))
    assume(re.fullmatch(r"(?!\d+(\.|$))\w+(\.\w+)*", place.path))
    language = data.draw(st.sampled_from(list(ELSEWHERE)))
    event(language)
    at = data.draw(st.integers(0, len(place.segments) - 1))
    text = ELSEWHERE[language](list(place.segments), at)
    try:
        found = select(model, text)
    except (PatternError, NoMatchError) as error:
        ((proposed, _),) = proposed_by(error)
        found = select(model, proposed, strict=False)
    assert place.path in found
