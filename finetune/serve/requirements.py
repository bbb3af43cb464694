"""What serving needs beside the rest: the packages of the extra `serve`."""

from __future__ import annotations

from importlib.util import find_spec

from finetune.errors import FinetuneError

PACKAGES = ("fastapi", "uvicorn", "httptools", "prometheus_client")


def require_packages() -> None:
    """Raises a FinetuneError if one of them is not installed."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise FinetuneError(
            f"not installed: {', '.join(missing)}",
            where="finetune serve",
            fix="pip install 'moe-qlora[serve]'",
        )
