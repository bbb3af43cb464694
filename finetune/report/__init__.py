"""One look for every page and picture: the palette, the jinja environment, and figures as PNG or inside a page."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
