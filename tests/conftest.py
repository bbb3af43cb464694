"""Shared input for tests of the whole path: a random two-layer Mixtral with the real tokenizer, and a recipe for it.

Random weights keep these tests fast and independent of the bundled model; the bundled model has tests of its own.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tokenized rows are kept; tests neither find earlier ones nor leave any.
if "PYTEST_XDIST_WORKER" not in os.environ or "MOE_QLORA_CACHE" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="moe-qlora-tests-")
    os.environ["MOE_QLORA_CACHE"] = _cache.name
# Read once, when trackio is imported.
os.environ["TRACKIO_DIR"] = os.path.join(os.environ["MOE_QLORA_CACHE"], "trackio")

REPOSITORY = Path(__file__).resolve().parent.parent
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def pytest_collection_finish() -> None:
    """What the imports left is never garbage; looking through it takes 0.3 s, several times in a training run."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def small_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random bf16 Mixtral: 2 layers, 4 experts, vocabulary 32000; never written to."""
    from tests.models import save_small_mixtral

    return save_small_mixtral(tmp_path_factory.mktemp("small-mixtral"), tied=True)


@pytest.fixture(scope="session")
def saved_adapter(small_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained adapter of rank 4 on the small Mixtral, as a run saves it; never written to."""
    from tests.models import save_lora

    return save_lora(small_mixtral, tmp_path_factory.mktemp("run") / "adapter")


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 short conversations as JSON lines."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What comes after {number}?"},
                {"role": "assistant", "content": f"After {number} comes {number + 1}."},
            ]
        }
        for number in range(32)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def write_recipe(tmp_path: Path, small_mixtral: Path, conversations: Path) -> Callable[..., Path]:
    """Writes a recipe of eight steps on the small Mixtral; keyword arguments replace or add sections."""

    def write(name: str = "recipe.yaml", **sections: object) -> Path:
        recipe: dict[str, object] = {
            "model": {"path": str(small_mixtral), "device": "cpu"},
            "data": {"train": str(conversations), "eval": str(conversations), "max_eval_rows": 8},
            "training": {
                "max_steps": 8,
                "per_device_train_batch_size": 4,
                "learning_rate": 2e-3,
                "logging_steps": 1,
                "max_length": 64,
                "eval_strategy": "no",
                "save_strategy": "no",
            },
            # Drawing takes seconds a run, and so does comparing with the base; tests of them ask for them.
            "router": {"figures": False, "probe_tokens": 0},
            "output": {"dir": str(tmp_path / "run")},
        }
        for section, values in sections.items():
            merged = {**recipe.get(section, {}), **values}  # type: ignore[dict-item]
            recipe[section] = {key: value for key, value in merged.items() if value != "<absent>"}
        path = tmp_path / name
        path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")  # JSON is YAML
        return path

    return write
