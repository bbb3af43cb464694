"""Passes of a model over the probe, with every token's routing; and the checks before the model loads.

Only the decoder runs: the head's logits, 32,000 a token, are not needed. Rows of one domain lie one after another in a
pass, told apart by their positions, so nothing is padded and the experts are dequantized once for many rows: the 84
rows of the bundled probe are 16 passes with Mixtral's tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from datasets.utils import tqdm

from finetune.errors import OutputError
from finetune.moe import LoadedModel, read_config
from finetune.router.hook import Recording, find_routers
from finetune.router.study.probe import ROW_TOKENS, Probe, ProbeRow

PASS_TOKENS = 2048


def routed_rows(loaded: LoadedModel, probe: Probe, *, title: str) -> Iterator[tuple[list[ProbeRow], Recording]]:
    """Some rows of one domain after the decoder has read them, in evaluation mode, with the routing of their tokens.

    Args:
        title: what the progress bar says.

    Raises:
        ModelError: the model has no routers.
    """
    loaded.model.eval()
    decoder, _ = find_routers(loaded.model)
    bar = tqdm(total=probe.tokens, unit=" tokens", unit_scale=True, desc=title, delay=1)
    with bar, Recording(loaded.model) as recording:
        for rows in _passes(probe.rows):
            ids = torch.tensor([[token for row in rows for token in row.ids]], device=loaded.device)
            positions = torch.cat([torch.arange(len(row.ids)) for row in rows]).unsqueeze(0).to(loaded.device)
            with torch.no_grad():
                decoder(input_ids=ids, position_ids=positions, use_cache=False)
            yield rows, recording
            bar.update(ids.numel())


def _passes(rows: Sequence[ProbeRow]) -> Iterator[list[ProbeRow]]:
    """Neighbouring rows of one domain, as many as `PASS_TOKENS` takes."""
    taken: list[ProbeRow] = []
    for row in rows:
        full = sum(len(other.ids) for other in taken) + len(row.ids) > PASS_TOKENS
        if taken and (full or row.domain != taken[0].domain):
            yield taken
            taken = []
        taken.append(row)
    if taken:
        yield taken


def row_tokens(model: str) -> int:
    """Tokens of a row that a model folder or hub id has positions for, at most `ROW_TOKENS`."""
    return min(ROW_TOKENS, int(read_config(model).get("max_position_embeddings") or ROW_TOKENS))


def require_writable(option: str, path: Path | None) -> None:
    """Asked before the model loads.

    Raises:
        OutputError: the file cannot be written; `option` names it.
    """
    if path is None:
        return
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not above.is_dir():
        raise OutputError(
            f"the file cannot be written: {path if path.is_dir() else above} is a "
            f"{'folder' if path.is_dir() else 'file'}",
            where=f"{option} {path}",
            fix="name a file in a folder",
        )
