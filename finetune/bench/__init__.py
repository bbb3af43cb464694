"""How fast a recipe trains and a model answers on this machine; a table, then one JSON line."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
