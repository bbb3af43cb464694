"""How much memory a training run needs, before anything is loaded, and what to change when it does not fit.

Why: a run that dies of memory after minutes of loading tells nobody what to change, and what a step keeps for its
backward pass (finetune/memory/activations.py) can only be planned when bytes are known before the first step.

How: run.py says what the estimate depends on. static.py counts what is there all the time: weights, trained
parameters, optimizer. step.py walks through a training step and finds its peak. totals.py adds both up to
a table, finds the largest micro-batch and says what to change. Arithmetic only: no torch.

Leaves out: memory of other processes, evaluation batches larger than training's, sharding (each process is counted as
holding everything).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
