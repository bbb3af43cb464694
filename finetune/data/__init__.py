"""Conversations in, supervised tokens out: readers, forms, chat templates, marks, and rows on the disk."""

from __future__ import annotations

from finetune.data.batching import pack
from finetune.data.chat import apply_template
from finetune.data.pipeline import EncodedSource, Reading, Teaching, encode_source
from finetune.data.readers import Source
from finetune.data.rows import IGNORED

__all__ = [
    "IGNORED",
    "EncodedSource",
    "Reading",
    "Source",
    "Teaching",
    "apply_template",
    "encode_source",
    "pack",
]
