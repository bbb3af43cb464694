from .command import serve as serve
from .requirements import require_packages as require_packages
