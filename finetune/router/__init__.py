"""The router, watched: counts on the device, formulas over them, and a trainer callback that logs both.

Figures are in `finetune.router.plots`; only it and `finetune.report` import matplotlib.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
