"""Words of the check: counted against Python's own knowledge of characters and against arithmetic."""

from __future__ import annotations

import unicodedata

import pytest

from finetune.data.check.words import compact, duration, part_of, positions, share, verdict, visible
from tests.data.check.samples import faulty, sound

# Joiners and direction marks that emoji, Persian and Arabic are written with.
KEPT = {"\u200c", "\u200d", "\u200e", "\u200f", "\n", "\t"}
# Formatting characters that are drawn, and so can be seen, where their script is used.
DRAWN = {"ARABIC", "SYRIAC", "KAITHI", "EGYPTIAN", "SHORTHAND", "MUSICAL", "MONGOLIAN"}


def test_every_control_and_formatting_character_is_written_out():
    for code in range(0x110000):
        char = chr(code)
        if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            assert visible(char) == char
        elif unicodedata.name(char, "UNNAMED").split()[0] not in DRAWN:
            assert visible(char) == (char if char in KEPT else repr(char)[1:-1]), hex(code)


def test_a_text_keeps_what_can_be_seen():
    text = "tab\tnewline\n two  spaces 👩‍👩‍👧 שלום مرحبا می‌خواهم 日本語"
    assert visible(text) == text


def test_a_share_is_whole_or_nothing_only_when_it_is():
    assert [share(x) for x in (0.0, 1e-9, 0.0012, 0.4136, 0.9991, 0.99999, 1.0)] == [
        "0%",
        "<0.1%",
        "0.1%",
        "41.4%",
        "99.9%",
        "99.9%",
        "100%",
    ]
    assert part_of(0, 0) == "0%"
    assert part_of(1, 3) == "33.3%"


def test_numbers_and_times():
    assert [compact(n) for n in (0, 99_999, 123_456, 9_840_123, 40_000_000, 1_234_000_000)] == [
        "0",
        "99,999",
        "123 k",
        "9.84 M",
        "40.0 M",
        "1.23 B",
    ]
    times = (40 / 3600, 8 / 60, 3.2, 52)
    assert [duration(hours) for hours in times] == ["40 s", "8 min", "3 h 12 min", "2 d 4 h"]


@pytest.mark.parametrize(
    ("where", "total", "text"),
    [
        (["a.jsonl line 3"], 1, "a.jsonl line 3"),
        (["a.jsonl line 3", "a.jsonl line 12", "b c.csv row 4"], 9, "a.jsonl line 3, 12 · b c.csv row 4 and 6 more"),
        ([], 2, " and 2 more"),
    ],
)
def test_positions(where: list[str], total: int, text: str):
    assert positions(where, total) == text


def test_the_verdict_counts_faults_and_warnings():
    assert verdict(sound()).headline == "The data is fine"
    document = faulty()
    assert (verdict(document).level, verdict(document).headline) == ("error", "2 faults, 1 warning")
    document["faults"] = [fault for fault in document["faults"] if fault["level"] == "warning"] * 3
    assert (verdict(document).level, verdict(document).headline) == ("warning", "3 warnings")
