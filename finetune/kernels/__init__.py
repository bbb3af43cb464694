"""Computation with 4-bit experts: the NF4 codec and the frozen mixture-of-experts operation."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
