"""What the page needs beside the rest: the package of the extra `ui`."""

from __future__ import annotations

from importlib.util import find_spec

from finetune.errors import FinetuneError


def require_gradio() -> None:
    """Raises a FinetuneError where gradio is not installed."""
    if find_spec("gradio") is None:
        raise FinetuneError("gradio is not installed", where="finetune chat --ui", fix="pip install 'moe-qlora[ui]'")
