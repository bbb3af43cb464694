"""What was tuned, through one door: every command that reads an adapter asks `Adapter`.

Why: kind, base, scaling, targets, tokenizer and chat template are facts of the adapter, and where each command read
them for itself, one answered with the base's template and another merged what it should have refused. Here they are
read once (settings.py, files.py), checked before anything is loaded, and put on a base (lora.py, non_moe.py) as they
were trained, or added to its weights one at a time (merging.py). Leaves out the folders that a merge
writes (export/).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
