"""What the page needs beside the rest: the packages of the extra `ui`."""

from __future__ import annotations

from importlib.util import find_spec

from finetune.errors import FinetuneError


def require_gradio() -> None:
    """Raises a FinetuneError where gradio, or what serves it, is not installed."""
    for package in ("gradio", "httptools"):
        if find_spec(package) is None:
            what = f"{package} is not installed"
            raise FinetuneError(what, where="finetune chat --ui", fix="pip install 'moe-qlora[ui]'")
