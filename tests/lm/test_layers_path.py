"""``lm.layers_path``: where the list is that ``model.layers`` gives."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
import model_folders
import pytest

from mlx_modswap import lm, select


class Model(nn.Module):
    """A model whose blocks are where a test puts them."""

    def __init__(self, layers: Any, **places: Any):
        super().__init__()
        self._given = (layers,)  # in a tuple, so that MLX does not see it
        for name, value in places.items():
            setattr(self, name, value)

    @property
    def layers(self):
        return self._given[0]


def blocks(count: int) -> list[nn.Module]:
    return [nn.Linear(4, 4) for _ in range(count)]


def test_the_path_of_a_llama_begins_a_pattern_for_its_last_blocks():
    llama: Any = model_folders.llama()
    path = lm.layers_path(llama)

    assert path == "model.layers"
    assert list(select(llama, f"{path}[-2:].**.q_proj").values()) == [
        block.self_attn.q_proj for block in llama.layers[-2:]
    ]


def test_the_list_itself_and_a_part_of_it_have_its_path():
    body = blocks(4)

    assert lm.layers_path(Model(body, body={"h": body})) == "body.h"
    assert lm.layers_path(Model(body[1:3], body={"h": body})) == "body.h"
    assert lm.layers_path(Model(tuple(body), body=[blocks(1), body])) == "body.1"
    assert lm.layers_path(Model(body[:1], h=body)) == "h"


def test_the_list_that_holds_all_of_the_blocks_is_taken():
    body = blocks(3)

    assert lm.layers_path(Model(body, first=body[:1], all=list(body))) == "all"


def test_a_dict_of_blocks_is_not_a_list():
    one, two = blocks(2)
    with pytest.raises(
        ValueError, match=r"^Model\.layers is not a list in the tree: its first"
    ) as e:
        lm.layers_path(Model([one, two], h={"0": one, "1": two}))
    assert str(e.value).endswith("block, a Linear, is in no list of the model")


@pytest.mark.parametrize(
    ("layers", "places", "message"),
    [
        (None, {}, "Model has no attribute 'layers'"),
        (3, {}, "Model.layers is int, not a list of blocks"),
        ([], {}, "Model.layers is an empty list, not a list of blocks"),
        ({"0": 1}, {}, "Model.layers is dict, not a list of blocks"),
        (
            blocks(2),
            {},
            "Model.layers is not a list in the tree: its first block, a Linear, is in no list of "
            "the model",
        ),
    ],
)
def test_an_error_says_what_layers_is_instead(layers, places, message):
    with pytest.raises(ValueError, match="layers") as caught:
        lm.layers_path(Model(layers, **places))
    assert str(caught.value) == message


def test_blocks_in_two_lists_are_in_none_of_them():
    first, second = blocks(2), blocks(3)
    with pytest.raises(ValueError, match="layers") as caught:
        lm.layers_path(Model(first + second, a=first, b=second))
    assert str(caught.value) == (
        "Model.layers is not a list in the tree: only some of its 5 blocks are in 'a'"
    )


def test_an_error_names_each_list_that_holds_the_first_block():
    first, second = blocks(2)
    with pytest.raises(ValueError, match="layers") as caught:
        lm.layers_path(Model([first, second], a=[first], b=[first]))
    assert str(caught.value).endswith("only some of its 2 blocks are in 'a' or 'b'")


def test_an_error_names_the_class_of_the_first_block():
    with pytest.raises(ValueError, match=r"its first block, a ReLU, is in no list of the model$"):
        lm.layers_path(Model([nn.ReLU(), nn.Tanh()]))


def test_a_model_without_layers_has_no_path():
    with pytest.raises(ValueError, match=r"^Linear has no attribute 'layers'$"):
        lm.layers_path(nn.Linear(4, 4))
