"""`finetune evaluate`: how good models are on held-out conversations, and how far they are from a reference."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
