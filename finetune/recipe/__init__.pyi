from .load import load_recipe as load_recipe
from .load import resolved_yaml as resolved_yaml
from .origin import provenance as provenance
from .schema import Recipe as Recipe
from .schema import recipe_schema as recipe_schema
