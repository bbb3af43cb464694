"""What liger-kernel exchanges in transformers' modules is put back after each test: later ones build plain models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers.models.mixtral import modeling_mixtral


@pytest.fixture(autouse=True)
def plain_modeling() -> Iterator[None]:
    before = dict(vars(modeling_mixtral))
    yield
    vars(modeling_mixtral).update(before)
