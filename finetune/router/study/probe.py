"""The text on which a router is looked at: the bundled probe, or the user's own, as rows of token ids by domain.

Why: routing depends on the text, so two models, or one before and after tuning, are compared on the same tokens. How:
`probe.jsonl` beside this file holds the same sentences in five languages, and code (`probe.md` says from where). A
user's file is read by `finetune.data`: rows with a `text` (and a `domain`), conversations in any form that training
takes, or plain text. Text goes through the encoder that training uses, so a control token that somebody spelled stays
text. Files are read as far as needed, `max_tokens` bounds the memory.

A row is a passage, or a stretch of a long one, and begins as training text begins.

`routed_rows` runs a model over it. Only the decoder runs: the head's logits, 32,000 a token, are not needed. Rows of
one domain lie one after another in a pass, told apart by their positions, so nothing is padded and the experts are
dequantized once for many rows: the 84 rows of the bundled probe are 16 passes with Mixtral's tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets.utils import tqdm

from finetune.data import (
    SUFFIXES,
    ChatEncoder,
    Form,
    Reader,
    Refused,
    RowFault,
    Source,
    apply_template,
    encoder_of,
    find_form,
    open_source,
    parse,
    rows_of,
    sample_row,
    suffix_of,
    text_form,
)
from finetune.errors import DataError, OutputError
from finetune.moe import LoadedModel, read_config
from finetune.router.hook import Recording, find_routers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLED = Path(__file__).with_name("probe.jsonl")
ROW_TOKENS = 512
MAX_TOKENS = 65_536
_PASS_TOKENS = 2048
# A plain text is read as far as so many bytes for each token that is wanted; a token has 3 to 5.
_BYTES_A_TOKEN = 16


@dataclass(frozen=True)
class ProbeRow:
    """Token ids of one passage, the beginning of sequence first where the tokenizer has one."""

    domain: str
    ids: list[int]


@dataclass(frozen=True)
class Probe:
    """Rows to read, domain after domain.

    Attributes:
        name: "bundled", or the files.
        rows: 2 to `ROW_TOKENS` tokens each, those of a domain together.
        refused: rows of the user's files that could not be read.
    """

    name: str
    rows: list[ProbeRow]
    refused: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    @property
    def domains(self) -> list[str]:
        """Names in the order of the rows."""
        return list(dict.fromkeys(row.domain for row in self.rows))

    def describe(self) -> dict[str, Any]:
        """What a document says of it."""
        return {"name": self.name, "rows": len(self.rows), "tokens": self.tokens}


def read_probe(
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[str] = (),
    *,
    max_tokens: int = MAX_TOKENS,
    row_tokens: int = ROW_TOKENS,
) -> Probe:
    """Reads and tokenizes the probe.

    Args:
        tokenizer: of the model. Conversations take its chat template; where it has none, the one that fits it.
        data: files (JSON lines or another format of training data, or plain text), folders or hub ids; none for the
            bundled probe. A row without a `domain` is of the domain that its file's name says.
        max_tokens: read at most so many, spread evenly over the domains; the first ones of each.
        row_tokens: cut longer passages; not above the model's positions.

    Raises:
        DataError: a file is missing, empty, not text, or without any row that can be used.
    """
    bos = [] if tokenizer.bos_token_id is None else [int(str(tokenizer.bos_token_id))]
    assert row_tokens > 1, "a row holds no pair of tokens"
    found: dict[str, list[list[int]]] = {}
    sizes: dict[str, int] = {}
    refused = 0
    for path in data or [str(BUNDLED)]:
        usable, reason = 0, "every passage is empty"
        passages = _Passages(path, tokenizer, max_tokens)
        for domain, ids in passages:
            if isinstance(ids, RowFault):
                refused, reason = refused + 1, str(ids)
                continue
            content = ids[len(bos) :] if ids[: len(bos)] == bos else ids
            rows = [bos + part for part in _parts(content, row_tokens - len(bos))]
            # A single token has no neighbour, and at the end of packed rows it would be taken for filler.
            rows = [row for row in rows if len(row) > 1]
            usable += len(rows)
            found.setdefault(domain, []).extend(rows)
            sizes[domain] = sizes.get(domain, 0) + sum(map(len, rows))
            passages.full = {name for name, size in sizes.items() if size >= max_tokens}
        if not usable:
            raise DataError(
                f"the file holds no text to route: {reason}",
                where=path,
                allowed="JSON lines with `text` (and `domain`), conversations, or plain text in UTF-8",
                fix="name a file with text, or leave --data away for the bundled probe",
            )
    shares = _even_shares(sizes, max_tokens)
    kept = [ProbeRow(domain, ids) for domain, rows in found.items() for ids in _first(rows, shares[domain])]
    if not kept:
        raise DataError(
            f"{max_tokens} tokens are too few for {len(found)} domains",
            where="--max-tokens",
            allowed="two or more tokens for each domain",
            fix="read more of the text",
        )
    return Probe("bundled" if not data else ", ".join(data), kept, refused)


class _Passages:
    """Domain and token ids of each passage of one file, or why a row has none; passes over domains that are `full`."""

    def __init__(self, path: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int):
        self.path, self.tokenizer, self.max_tokens = path, tokenizer, max_tokens
        self.encoder: ChatEncoder = encoder_of(tokenizer)
        self.full: set[str] = set()
        self.default = Path(path).stem.removesuffix(".jsonl")

    def __iter__(self) -> Iterator[tuple[str, list[int] | RowFault]]:
        file = Path(self.path).expanduser()
        if file.is_file() and suffix_of(file) not in SUFFIXES:
            yield self.default, self._encode(_read_text(file, self.max_tokens * _BYTES_A_TOKEN))
            return
        reader = open_source(Source(self.path))
        sample = sample_row(reader)
        if isinstance(sample.get("text"), str) and text_form(sample["text"]) is None:
            yield from self._texts(reader)
        else:
            yield from self._conversations(reader, sample)

    def _texts(self, reader: Reader) -> Iterator[tuple[str, list[int] | RowFault]]:
        has_domains = False
        for chunk, _ in reader.chunks(0):
            for _, row in rows_of(chunk):
                if isinstance(row, RowFault):
                    yield self.default, row
                    continue
                named = row.get("domain")
                has_domains |= named is not None
                domain = self.default if named is None else str(named)
                if domain in self.full:
                    if not has_domains:
                        return
                elif not isinstance(row.get("text"), str):
                    yield domain, RowFault("`text` is missing, or not a text")
                else:
                    yield domain, self._encode(row["text"])

    def _conversations(self, reader: Reader, sample: Mapping[str, Any]) -> Iterator[tuple[str, list[int] | RowFault]]:
        form: Form = find_form(sample, "auto", columns={}, roles={}, where=self.path)
        if self.tokenizer.chat_template is None:
            apply_template(self.tokenizer, "auto")
            self.encoder = encoder_of(self.tokenizer)
        for chunk, _ in reader.chunks(0):
            parsed = parse(chunk, form)
            for _, reason in parsed.refused:
                yield self.default, RowFault(reason)
            # In small parts: a chunk has a thousand conversations, and a few may be enough.
            for start in range(0, len(parsed.conversations), 32):
                for row in self.encoder.encode_each(parsed.conversations[start : start + 32]):
                    yield self.default, RowFault(str(row)) if isinstance(row, Refused) else row.ids.tolist()
                if self.default in self.full:
                    return

    def _encode(self, text: str) -> list[int] | RowFault:
        try:
            return self.encoder.encode_text(text) if text.strip() else []
        except Refused as refusal:
            return RowFault(str(refusal))


def _read_text(path: Path, size: int) -> str:
    with path.open("rb") as file:
        content = file.read(size)
    try:
        # A cut may split the last character; anything else that is not UTF-8 is refused.
        whole = len(content) < size
        return content.decode("utf-8") if whole else content[: content.rfind(b"\n") + 1 or None].decode("utf-8")
    except UnicodeDecodeError as fault:
        raise DataError(
            f"the file is not text in UTF-8 ({fault.reason} at byte {fault.start})",
            where=str(path),
            allowed=f"plain text in UTF-8, or data in a file that ends in {', '.join(SUFFIXES)}",
            fix="name a text file",
        ) from None


def _parts(ids: list[int], size: int) -> list[list[int]]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def _even_shares(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Tokens for each domain: as many as all others may have, or all that there are."""
    shares: dict[str, int] = {}
    for left, (name, size) in zip(range(len(sizes), 0, -1), sorted(sizes.items(), key=lambda x: x[1]), strict=True):
        shares[name] = min(size, total // left)
        total -= shares[name]
    return shares


def _first(rows: list[list[int]], tokens: int) -> Iterator[list[int]]:
    """The first rows of so many tokens, the last one cut; one of which a single token is left is left out."""
    for row in rows:
        kept = row[:tokens]
        if len(kept) < 2:
            return
        yield kept
        tokens -= len(kept)


# ---- passes of a model -----------------------------------------------------------------------------------------------


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
    """Neighbouring rows of one domain, as many as `_PASS_TOKENS` takes."""
    taken: list[ProbeRow] = []
    for row in rows:
        full = sum(len(other.ids) for other in taken) + len(row.ids) > _PASS_TOKENS
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
