"""Every file of a model or adapter: read and checked here, before anything is loaded from it.

`json_file` reads JSON and `headers` the headers of safetensors; `schemas` knows what each JSON file holds; `upstream`
blames a file for what upstream raises of it; `folder` looks at a model folder, `resumable` at a run's checkpoints.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
