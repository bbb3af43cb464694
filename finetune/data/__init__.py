"""Conversations in, supervised tokens out: sources, chat template, label mask and the report on all three."""

from __future__ import annotations

from finetune.data.audit import SupervisionReport, audit, require_supervision
from finetune.data.chat import apply_template
from finetune.data.mask import supervise
from finetune.data.sources import load_conversations

__all__ = [
    "SupervisionReport",
    "apply_template",
    "audit",
    "load_conversations",
    "require_supervision",
    "supervise",
]
