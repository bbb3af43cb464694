from .command import run_evaluate as run_evaluate
from .divergence import Fidelity as Fidelity
from .divergence import fidelity_between as fidelity_between
from .harness import run_harness as run_harness
from .held_out import HeldOut as HeldOut
