"""The JSON files of a model, an adapter or a run: the one place that reads them.

Python's parser lets pass, or answers with three kinds of exception, what no such file holds: nesting until the stack
ends, numbers of thousands of digits, a key written twice, half a surrogate pair. Each is refused with its reason here,
so that whoever reads the values later meets none of it. NaN passes: metrics hold it; types refuse it where it matters.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError, ModelError

_DEEPEST = 64  # a config is four levels deep, a tokenizer eight
_LARGEST = 512 * 2**20  # bytes; the largest tokenizers have about 35 million
_LONGEST_NUMBER = 300  # digits; a float holds no more. 1e30 written out is common in tokenizer_config.json.


class NotJson(ValueError):
    """Why some bytes are not JSON that can be used, as the end of "the file is not valid JSON: ..."."""


def parse_json(raw: bytes, *, unique_keys: bool = True) -> Any:
    """The value that UTF-8 text holds.

    Args:
        unique_keys: refuse an object that names a key twice.

    Raises:
        NotJson: it is no JSON, or goes beyond what such a file holds.
    """
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, parse_int=_whole, object_pairs_hook=_object if unique_keys else None)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise NotJson(f"it is not UTF-8 text (byte {error.start})") from None
    except UnicodeEncodeError:
        raise NotJson("it holds half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise NotJson(str(error) if raw else "it is empty") from None
    except RecursionError:
        raise NotJson(f"it is nested deeper than {_DEEPEST} levels") from None
    _require_shallow(value)
    return value


def read_json(path: Path, *, kind: type[FinetuneError] = ModelError, unique_keys: bool = True) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        FinetuneError: of the given kind, if the file is missing, cannot be read or holds no usable JSON object.
    """
    again = "copy the file again"
    try:
        if not stat.S_ISREG((found := path.stat()).st_mode):
            what = "a folder" if path.is_dir() else "no regular file"
            raise kind(f"{path.name} is {what}", where=str(path), fix=again)
        if found.st_size > _LARGEST:
            raise kind(f"{path.name} has {found.st_size:,} bytes, and so is no such file", where=str(path), fix=again)
        content = parse_json(path.read_bytes(), unique_keys=unique_keys)
    except FileNotFoundError:
        raise kind(
            f"there is no {path.name}", where=str(path.parent), fix="name a folder that transformers or peft saved"
        ) from None
    except OSError as error:
        fix = "check the file's permissions"
        raise kind(f"{path.name} cannot be read: {error.strerror}", where=str(path), fix=fix) from None
    except NotJson as error:
        raise kind(f"{path.name} is not valid JSON: {error}", where=str(path), fix=again) from None
    if not isinstance(content, dict):
        raise kind(f"{path.name} does not hold a JSON object", where=str(path), fix=again)
    return content


def _whole(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise NotJson(f"it holds a whole number of {len(digits):,} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise NotJson(f"the key {twice[:60]!r} is written twice")
    return result


def _require_shallow(value: Any) -> None:
    """Python's parser goes a thousand levels deep; what copies and prints the value later does not."""
    level = [value]
    for _ in range(_DEEPEST + 1):
        containers = [item for item in level if isinstance(item, dict | list)]
        if not containers:
            return
        level = [item for held in containers for item in (held.values() if isinstance(held, dict) else held)]
    raise NotJson(f"it is nested deeper than {_DEEPEST} levels")
