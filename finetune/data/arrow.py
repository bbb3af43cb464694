"""Arrow data that may be damaged: checked before a value is read, and read as Python values.

Why: Arrow follows offsets without a look, and one damaged byte in a file ends the process. How: every array of a batch
is checked in full, texts as bytes, so that bad UTF-8 costs its own row and not the file (`values_of`). Lengths that no
byte stands for are refused, as a damaged length of nulls is read for ever. Leaves out where batches come from.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from finetune.data.rows import RowFault

# What pyarrow raises for a damaged file; a name that is not UTF-8 is a ValueError.
DAMAGE = (pa.ArrowException, OSError, ValueError, OverflowError)
_BAD_ROW = "a value that cannot be read (bad UTF-8, or out of its type's range)"
_AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}


def checked(batch: pa.RecordBatch, file_bytes: int) -> pa.RecordBatch:
    """The batch, if each of its offsets lies in its data.

    Raises:
        pa.ArrowException: one does not.
    """
    if batch.num_columns == 0 and batch.num_rows:
        raise pa.ArrowInvalid("rows without a column")
    batch.validate()  # that lengths are possible, and columns equally long
    for column in batch.columns:
        _texts_as_bytes(column, file_bytes).validate(full=True)
    return batch


def _texts_as_bytes(array: Any, file_bytes: int) -> Any:
    """The same buffers with text as bytes, as deep as lists and structs go; nothing is copied, and no offset followed.

    Any other nested array is left as it is, so that bad UTF-8 in it counts as damage.
    """
    kind = array.type
    if pa.types.is_null(kind) and len(array) > 8 * file_bytes:
        raise pa.ArrowInvalid(f"{len(array)} nulls in a file of {file_bytes} bytes")
    own, children = array.buffers(), []
    if kind in _AS_BYTES:
        kind = _AS_BYTES[kind]
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        children = [_texts_as_bytes(array.values, file_bytes)]
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        own, kind = own[:2], make(children[0].type)
    elif pa.types.is_struct(kind) and kind.num_fields:
        children = [_texts_as_bytes(array.field(i), file_bytes) for i in range(kind.num_fields)]
        own, kind = own[:1], pa.struct([(str(i), child.type) for i, child in enumerate(children)])
    else:
        return array
    return pa.Array.from_buffers(kind, len(array), own, offset=array.offset, children=children)


def values_of(batch: pa.RecordBatch) -> list[Any]:
    """Rows of an Arrow batch as mappings; a row that has no Python value is a `RowFault`."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # UnicodeDecodeError is one; only the row itself is lost
        if batch.num_rows == 1:
            return [RowFault(_BAD_ROW)]
        return [value for place in range(batch.num_rows) for value in values_of(batch.slice(place, 1))]
