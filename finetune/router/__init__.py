"""The router, watched: counts on the device, formulas over them, and a trainer callback that logs both.

Figures live in `finetune.router.plots`, which alone imports matplotlib and is therefore not imported here.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
