"""What every HTTP server here has in common: its socket, the names it answers to, and the limits of a connection."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
