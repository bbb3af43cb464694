"""Measuring: the training path, what others would do instead, single kernels; a table, then one JSON line."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
