"""The recipe: one typed YAML file that says everything about a run."""

from __future__ import annotations

from finetune.recipe.load import load_recipe, resolved_yaml
from finetune.recipe.origin import provenance
from finetune.recipe.schema import Recipe, recipe_schema

__all__ = ["Recipe", "load_recipe", "provenance", "recipe_schema", "resolved_yaml"]
