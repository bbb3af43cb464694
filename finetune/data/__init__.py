"""Conversations in, supervised tokens out: readers, forms, chat templates, marks, and rows on the disk."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
