from .command import serve as serve
