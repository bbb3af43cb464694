"""Reading a recipe imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.recipe.recipe_texts import SMALLEST, write

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
from finetune.recipe import load_recipe, provenance, recipe_schema, resolved_yaml
resolved_yaml(load_recipe(sys.argv[1], ["training.optim=sgd", "training.lr_scheduler_type=cosine"]))
recipe_schema()
provenance()
heavy = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy"} & set(sys.modules)
sys.exit(f"imported: {sorted(heavy)}" if heavy else 0)
"""


def test_loading_a_recipe_leaves_torch_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(write(tmp_path, SMALLEST))], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
