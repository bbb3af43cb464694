"""One run, from its recipe to its adapter: the story (run.py), the trainer, what ends it, and where it logs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
