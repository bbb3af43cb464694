"""A small model that says something else with every token, which the shared one with its tied embeddings does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import save_small_mixtral


@pytest.fixture(scope="session")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Mixtral with 2 layers and the bundled model's tokenizer; never written to."""
    return save_small_mixtral(tmp_path_factory.mktemp("models") / "talkative", tied=False)
