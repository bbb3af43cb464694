"""Conversations with a trained model, in the terminal and on a page: faces of the engine (`finetune/infer`)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
