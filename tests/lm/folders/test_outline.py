"""How ``lm.save`` and ``lm.convert`` say in which way two models differ: a table of small cases."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_modswap.lm._folders.compare import Outline, Spec, difference

pytestmark = pytest.mark.usefixtures("on_the_cpu")

ADVICE = "or pass the config entry that sets"


def outlined(
    classes: dict[str, type] | None = None,
    arrays: dict[str, Spec] | None = None,
    constants: dict[tuple[str, str], mx.array] | None = None,
    **attributes: dict[str, str],
) -> Outline:
    """A model with a block ``a``, in which there is a layer ``a.b``; ``root`` is the model."""
    classes = {"": nn.Sequential, "a": nn.Sequential, "a.b": nn.Linear, **(classes or {})}
    named = {"": attributes.pop("root", {}), "a": {}, "a.b": {}, **attributes}
    return Outline(
        {path: (cls,) for path, cls in classes.items()},
        {path: named.get(path, {}) for path in classes},
        arrays or {},
        constants or {},
    )


def told(built: Outline, model: Outline, original: Outline | None = None) -> list[str]:
    """The differences, without what to do about them."""
    return difference(built, model, original).partition(":")[0].split(", and ")


# Layers


@pytest.mark.parametrize(
    ("built", "model", "differences"),
    [
        ({}, {}, [""]),
        (
            {"a.b": nn.ReLU},
            {},
            ["mlx-lm would build ReLU at a.b, but the model has Linear"],
        ),
        (  # the one around it says enough
            {"a": nn.GELU, "a.b": nn.ReLU},
            {},
            ["mlx-lm would build GELU at a, but the model has Sequential"],
        ),
        (
            {"": nn.GELU, "a": nn.ReLU, "a.b": nn.ReLU},
            {},
            ["mlx-lm would build GELU at the model itself, but the model has Sequential"],
        ),
        (
            {"a.b": nn.ReLU, "c": nn.ReLU},
            {},
            [
                "mlx-lm would build ReLU at a.b, but the model has Linear",
                "mlx-lm would build ReLU at c, but the model has nothing",
            ],
        ),
        ({}, {"a.c": nn.ReLU}, ["mlx-lm would build nothing at a.c, but the model has ReLU"]),
    ],
)
def test_other_layers(built, model, differences):
    assert told(outlined(built), outlined(model)) == differences


# Attributes


def attribute(name: str, one: str, other: str, place: str = "a") -> str:
    return f"mlx-lm would set {name} of {place} to {one}, but the model has {other}"


@pytest.mark.parametrize(
    ("built", "model", "differences"),
    [
        ({"x": "1"}, {"x": "1"}, [""]),
        ({"x": "1"}, {"x": "2"}, [attribute("x", "1", "2")]),
        ({}, {"x": "2"}, [attribute("x", "nothing", "2")]),
        ({"x": "1"}, {}, [attribute("x", "1", "nothing")]),
        (
            {"x": "1", "same": "0", "y": "3"},
            {"x": "2", "same": "0", "y": "4"},
            [attribute("x", "1", "2"), attribute("y", "3", "4")],
        ),
        # Private ones that mlx-lm does not set, or sets to None, come from a run.
        (
            {"_y": "None", "_z": "1", "x": "None"},
            {"_x": "1", "_y": "1", "_z": "2", "x": "1"},
            [attribute("_z", "1", "2"), attribute("x", "None", "1")],
        ),
        (
            {"__wrapped__._y": "None"},
            {"__wrapped__._x": "1", "__wrapped__._y": "1", "__wrapped__.x": "1"},
            [attribute("__wrapped__.x", "nothing", "1")],
        ),
    ],
)
def test_other_attributes(built, model, differences):
    assert told(outlined(a=built), outlined(a=model)) == differences


@pytest.mark.parametrize(("count", "end"), [(4, ""), (5, " and 1 more"), (6, " and 2 more")])
def test_the_first_four_of_many_differences_are_named(count, end):
    model = outlined(a={f"x{number}": "1" for number in range(count)})
    first = [attribute(f"x{number}", "nothing", "1") for number in range(4)]
    assert told(outlined(), model) == [*first[:3], first[3] + end]


def test_arrays_that_a_run_set_are_not_compared():
    constants = {("a", "x"): mx.zeros(2)}
    model = outlined(constants=constants, a={"x": "float32 (2,)", "y": "1"})
    assert told(outlined(), model) == [attribute("y", "nothing", "1")]


def test_what_to_do_about_other_attributes():
    assert difference(outlined(a={"x": "1"}), outlined(a={"x": "2"})) == (
        f"{attribute('x', '1', '2')}: set it in the model, {ADVICE} it: config={{...}}"
    )


@pytest.mark.parametrize(
    ("one", "other", "shown"),
    [
        ("1" * 60, "2" * 60, ("1" * 60, "2" * 60)),
        ("1" * 61, "2", (f"...{'1' * 60}...", "...2...")),
        ("2", "1" * 61, ("...2...", f"...{'1' * 60}...")),
        (
            f"first second {'3' * 70}",
            f"first second {'4' * 5}",
            (f"...{'3' * 60}...", "...44444..."),
        ),
        (f"word {'1' * 60}", "weird", (f"...{'word ' + '1' * 55}...", "...weird...")),
        # The texts are the same as far as they are shown.
        (f"12 {'3' * 60}", f"12 {'3' * 61}", (f"...{'3' * 60}...", f"...{'3' * 60}...")),
    ],
)
def test_long_values_are_shown_from_the_word_in_which_they_differ(one, other, shown):
    model = outlined(a={"x": other})
    assert told(outlined(a={"x": one}), model) == [attribute("x", *shown)]


MORE = {"a.c": nn.ReLU}  # one layer more than the model had


@pytest.mark.parametrize(
    ("name", "original", "place", "layers", "is_refused"),
    [
        ("x", "2", "a", MORE, False),  # a count, say, of the layers inside
        ("x", "3", "a", MORE, True),  # the value is neither the old nor the new one
        ("x", "2", "a.b", MORE, True),
        ("x", "2", "", MORE, False),
        ("x", "2", "a", {}, True),
        ("args.x", "2", "a", MORE, False),  # the arguments that it was built with
        ("args.x", "2", "a.b", MORE, False),
        ("args.x", "3", "a", MORE, True),
        ("args.x", "2", "a", {}, True),
        ("__wrapped__.x", "2", "a", MORE, False),
        ("__wrapped__.x", "2", "a.b", MORE, True),
    ],
)
def test_values_of_the_old_config_may_stay_where_layers_came_or_went(
    name, original, place, layers, is_refused
):
    def of(value: str, layers: dict[str, type]) -> Outline:
        attributes: Any = {place or "root": {name: value, "same": "0"}}
        return outlined(layers, **attributes)

    shown = attribute(name, "1", "2", place or "the model itself") if is_refused else ""
    assert told(of("1", layers), of("2", layers), of(original, {})) == [shown]


@pytest.mark.parametrize("old", ["True", "False"])
def test_a_bool_of_the_old_config_may_not_stay(old):
    new = {"True": "False", "False": "True"}[old]
    built, model = (outlined(MORE, a={"args.x": value}) for value in (new, old))
    original = outlined(a={"args.x": old})

    assert told(built, model, original) == [attribute("args.x", new, old)]


@pytest.mark.parametrize(
    ("shape", "old_shape", "is_refused"),
    [
        ((8, 4), (7, 4), False),
        ((8, 4), (8, 4), True),
        ((8, 4), (8, 32), True),  # a quantized layer packs the last dimension
    ],
)
def test_arguments_of_the_old_config_may_stay_where_shapes_changed(shape, old_shape, is_refused):
    def of(value: str, shape: tuple[int, int]) -> Outline:
        arrays = {"a.b.weight": Spec(mx.float32, shape), "a.b.bias": Spec(mx.float32, (8,))}
        return outlined(arrays=arrays, a={"args.x": value})

    shown = attribute("args.x", "1", "2") if is_refused else ""
    assert told(of("1", shape), of("2", shape), of("2", old_shape)) == [shown]


# Arrays and constants


@pytest.mark.parametrize(
    ("built", "model", "differences"),
    [
        ({"a.w": Spec(mx.float32, (2,))}, {"a.w": Spec(mx.float32, (2,))}, [""]),
        (
            {"a.w": Spec(mx.float32, (2,))},
            {"a.w": Spec(mx.float16, (2,)), "a.v": Spec(mx.float16, (2, 3))},
            [
                "mlx-lm would build float32 (2,) at a.w, but the model has float16 (2,)",
                "mlx-lm would build nothing at a.v, but the model has float16 (2, 3)",
            ],
        ),
        (
            {"a.w": Spec(mx.float32, (2,))},
            {},
            ["mlx-lm would build float32 (2,) at a.w, but the model has nothing"],
        ),
    ],
)
def test_other_arrays(built, model, differences):
    assert told(outlined(arrays=built), outlined(arrays=model)) == differences


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("built", "model", "differences"),
    [
        ({"x": [1, NAN, INFINITE]}, {"x": [1.000001, NAN, INFINITE]}, [""]),
        ({"x": [1, 2]}, {"x": [1, 2.1]}, ["mlx-lm would give x of a"]),
        ({"x": [1, 1]}, {"x": [1]}, ["mlx-lm would give x of a"]),  # `mx.allclose` would broadcast
        ({}, {"x": [1]}, [""]),
        ({"x": [1]}, {}, [""]),
        (
            {"x": [1], "y": [1]},
            {"x": [2], "y": [2]},
            ["mlx-lm would give x of a", "mlx-lm would give y of a"],
        ),
    ],
)
def test_other_constants(built, model, differences):
    def of(values: dict[str, Any]) -> Outline:
        return outlined(constants={("a", name): mx.array(value) for name, value in values.items()})

    tail = " other values than the model has" if differences != [""] else ""
    assert told(of(built), of(model)) == [one + tail for one in differences]
    assert ("set them in the model" in difference(of(built), of(model))) == bool(tail)
