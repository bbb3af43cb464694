"""What transformers, PEFT and tokenizers make of a file that is sound JSON of the right types and still cannot be used.

They raise whatever the line raises on which they stumble. Around a call that is handed one file and nothing else, all
of that is one message about the file. Not around anything that computes or allocates: there it would hide our mistakes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import FinetuneError, ModelError

# What Python code that is handed values of the wrong kind raises. Where one file is all that is handed in, it is the
# file's fault.
_WRONG_VALUES = (
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    AssertionError,
    ImportError,
    RuntimeError,
    OSError,
    re.error,
)


@contextlib.contextmanager
def blamed_on(file: Path | str, *, kind: type[FinetuneError] = ModelError) -> Iterator[None]:
    """What upstream raises inside is the fault of the one file that it reads there.

    Raises:
        FinetuneError: of the given kind, with upstream's first line.
    """
    name = Path(file).name
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:
        from huggingface_hub.errors import StrictDataclassError

        # The bare class is what the tokenizers library raises for everything.
        if type(error) is not Exception and not isinstance(error, (*_WRONG_VALUES, StrictDataclassError)):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = f"{type(error).__name__}: {' '.join(lines[:2])}"
        raise kind(
            f"{name} cannot be used: {said[:300]}",
            where=str(file),
            fix=f"use the {name} that belongs to the model; --debug shows where it failed",
        ) from error
