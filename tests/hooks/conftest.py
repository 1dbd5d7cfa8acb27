"""The model of the tests of hooks."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest
from oracle import Snapshot
from running import Model


@pytest.fixture
def model() -> Iterator[Model]:
    """A model that has to be the identical one after the test."""
    mx.random.seed(0)
    model = Model()
    mx.eval(model)
    before = Snapshot(model)
    yield model
    assert before.differences() == []
