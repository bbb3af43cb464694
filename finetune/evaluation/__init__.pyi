from .command import run_evaluate as run_evaluate
from .harness import run_harness as run_harness
