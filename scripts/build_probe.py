"""Builds the probe on which routers are studied: the same sentences in five languages, and code.

Why: a difference of routing between two domains should come from the language and not from the subject, and every user
of the toolkit should read the same text. How: `text_packages.py` fetches packages whose English messages have French,
German, Spanish and Italian translations; messages that are sentences in all five are joined into passages, the same
messages in every language. Code is cut from Django's own files, Python and JavaScript. Which messages and files are
taken depends on a hash of them, so the result is the same everywhere.

Writes `probe.jsonl`, one `{"domain", "text"}` a line, and `probe.md`, which names sources and licences; both are
part of the package. Leaves out messages with placeholders or markup, and near copies of one another.

    python scripts/build_probe.py --cache /tmp/text-packages
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from text_packages import LANGUAGES, PACKAGES, Package, fetch, read_members, read_po

ROOM = Path(__file__).resolve().parent.parent / "finetune" / "routerstudy"
SOURCES = [p for p in PACKAGES if p.name in ("django", "wagtail", "django-oscar", "django-allauth")]
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "licenses/LICENSE")
PASSAGES, CHARACTERS = 14, 900  # of a domain; characters of an English passage and of one of code
FEWEST_WORDS = 8  # of a message in English; shorter ones are labels
NOT_PROSE = re.compile(r"[%{}<>|\\\n]|https?:")
NOT_CODE = {"test", "tests", "migrations", "locale", "conf", "vendor"}
FIRST_CODE_LINE = re.compile(r"^(?:class|def|async def|function|const|\s{4}def|\s{4}async def) ", re.MULTILINE)

README = """# The bundled probe

`probe.jsonl`: {passages} passages, `{{"domain", "text"}}` a line, on which `finetune router drift` and
`finetune router analyze` look at routers unless other text is given. Written by `scripts/build_probe.py`.

| domain | passages | characters |
| --- | ---: | ---: |
{table}

The passages of the five languages say the same: messages of programs, with the translations that the programs ship.
Code is Python and JavaScript of Django. Sources, all free to redistribute under the licences below:

{sources}

{licences}"""


def order(text: str) -> str:
    """A place in an order that is the same everywhere and has nothing to do with the text."""
    return hashlib.sha256(text.encode()).hexdigest()


def messages(package: Package, archive: Path) -> list[dict[str, str]]:
    """Messages that have a sentence in every language, as they stand in the catalogue: code of language to text."""
    codes = list(LANGUAGES.values())
    found: dict[str, dict[str, str]] = {code: {} for code in codes}
    for name, content in read_members(archive, (".po",)):
        for code in codes:
            if {code, f"{code}_{code.upper()}"} & set(Path(name).parts):
                for original, translation in read_po(content.decode()):
                    found[code].setdefault(original, translation)
    rows = []
    for original in found[codes[0]]:
        if all(original in found[code] for code in codes):
            row = {"en": original, **{code: found[code][original] for code in codes}}
            row = {code: " ".join(text.split()) for code, text in row.items()}
            translated = len(set(row.values())) == len(row)
            if translated and len(original.split()) >= FEWEST_WORDS and not any(map(NOT_PROSE.search, row.values())):
                rows.append(row)
    return rows


def distinct(rows: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
    """One of the messages that begin alike."""
    seen: set[str] = set()
    for row in rows:
        beginning = " ".join(row["en"].lower().split()[:4])
        if beginning not in seen:
            seen.add(beginning)
            yield row


def parallel_passages(archives: dict[str, Path]) -> Iterator[dict[str, str]]:
    """Passages of several messages, one a line: name of the domain to text."""
    rows = list(distinct(row for package in SOURCES for row in messages(package, archives[package.name])))
    names = {"en": "english", **{code: name for name, code in LANGUAGES.items()}}
    passage: list[dict[str, str]] = []
    made = 0
    for row in sorted(rows, key=lambda row: order(row["en"])):
        passage.append(row)
        if sum(len(r["en"]) + 1 for r in passage) >= CHARACTERS:
            yield {name: "\n".join(r[code] for r in passage) for code, name in names.items()}
            passage, made = [], made + 1
            if made == PASSAGES:
                return
    raise AssertionError(f"only {made} passages")


def code_passages(archive: Path) -> Iterator[str]:
    """Stretches of Django's own files that begin at a definition; one in four is JavaScript."""
    files: dict[str, list[tuple[str, str]]] = {".py": [], ".js": []}
    for name, content in read_members(archive, (".py", ".js")):
        path = Path(name)
        if path.parts[0] == "django" and not NOT_CODE & set(path.parts) and not name.endswith(".min.js"):
            text = content.decode()
            if len(text) >= 3 * CHARACTERS:
                files[path.suffix].append((order(name), text))
    for suffix, wanted in ((".py", PASSAGES - PASSAGES // 4), (".js", PASSAGES // 4)):
        for _, text in sorted(files[suffix])[:wanted]:
            starts = [match.start() for match in FIRST_CODE_LINE.finditer(text)]
            third = text.rfind("\n", 0, len(text) // 3) + 1
            start = next((s for s in starts if s >= third), third)
            yield text[start : start + CHARACTERS].rpartition("\n")[0]


def licence(archive: Path) -> str:
    """The licence text that a package carries."""
    found = [
        content.decode()
        for name, content in read_members(archive, LICENCE_FILES)
        if len(Path(name).parts) == 1 or ".dist-info" in name
    ]
    assert found, f"{archive.name} carries no licence"
    return found[0].strip()


def build(cache: Path) -> None:
    """Writes the probe and its README into the package."""
    cache.mkdir(parents=True, exist_ok=True)
    archives = {package.name: fetch(package, cache) for package in SOURCES}
    passages = list(parallel_passages(archives))
    languages = ("english", "german", "french", "spanish", "italian")
    texts = {name: [passage[name] for passage in passages] for name in languages}
    texts["code"] = list(code_passages(archives["django"]))
    rows = [{"domain": domain, "text": text} for domain, found in texts.items() for text in found]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (ROOM / "probe.jsonl").write_text(lines, encoding="utf-8")
    readme = README.format(
        passages=len(rows),
        table="\n".join(f"| {name} | {len(found)} | {sum(map(len, found)):,} |" for name, found in texts.items()),
        sources="\n".join(f"- {p.name} {p.version} (PyPI), {p.licence}" for p in SOURCES),
        licences="\n\n".join(f"## Licence of {p.name}\n\n```\n{licence(archives[p.name])}\n```" for p in SOURCES),
    )
    (ROOM / "probe.md").write_text(readme + "\n", encoding="utf-8")
    print(f"{len(rows)} passages, {len(lines.encode()):,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder outside the repository for the downloads")
    build(parser.parse_args().cache)
