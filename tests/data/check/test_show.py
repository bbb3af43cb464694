"""The terminal: what is green is what is supervised, by a reader of escape sequences that is not rich."""

from __future__ import annotations

import re

import pytest

from finetune.console import Report
from finetune.data.check.show import show_examples, show_report
from tests.data.check.samples import HARD_EXAMPLES, INJECTED, SOUND_EXAMPLES, UNSEEN, example, faulty, piece, sound

SEQUENCE = re.compile(r"\x1b\[([0-9;]*)m")


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")


def coloured(output: str) -> list[tuple[str, set[int]]]:
    """Stretches of the output, each with the attributes that hold there: 32 green, 42 on green, 2 dim."""
    found, attributes, end = [], set[int](), 0
    for match in SEQUENCE.finditer(output):
        found.append((output[end : match.start()], set(attributes)))
        for code in match[1].split(";"):
            attributes = set() if int(code or 0) == 0 else attributes | {int(code)}
        end = match.end()
    return [*found, (output[end:], attributes)]


@pytest.mark.usefixtures("colours")
def test_what_is_supervised_is_green(capsys: pytest.CaptureFixture[str]):
    for row in SOUND_EXAMPLES:
        show_examples(Report(), [row])
        body = capsys.readouterr().out.partition(row["where"])[2].partition("\n")[2]
        stretches = coloured(body)
        green = "".join(text for text, attributes in stretches if attributes & {32, 42})
        # A line break has no colour.
        learnt = "".join(each["text"] for each in row["pieces"] if each["supervised"])
        assert green.replace("\n", "") == learnt.replace("\n", "")
        assert "".join(text for text, _ in stretches) == "".join(each["text"] for each in row["pieces"]) + "\n"
        chips = [text for text, attributes in stretches if attributes & {42, 47}]
        assert chips == [each["text"] for each in row["pieces"] if each["control"]]


def test_without_colour_brackets_mark_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_COLOR", "1")
    pieces = [
        piece("<s>", control=True),
        piece(" [INST] is </s> a token? [/INST]"),
        piece(" No.", supervised=True),
        piece("</s>", supervised=True, control=True),
    ]
    show_examples(Report(), [example(pieces)])
    assert "‹<s>› [INST] is </s> a token? [/INST]⟦ No.‹</s>›⟧\n" in capsys.readouterr().out


@pytest.mark.usefixtures("colours")
def test_data_neither_paints_nor_moves_the_terminal(capsys: pytest.CaptureFixture[str]):
    show_examples(Report(), [example([piece(UNSEEN), piece(INJECTED)], where=UNSEEN)])
    show_report(Report(), faulty())
    output = SEQUENCE.sub("", capsys.readouterr().out)
    assert "\\x1b[31mred\\x1b[0m" in output
    assert INJECTED in output
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\ud800-\udfff]", output)


def test_a_sound_set_takes_thirty_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    show_report(Report(), sound())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30
    assert lines[-1].startswith("The data is fine.")


def test_every_count_of_the_document_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "400")
    document = faulty()
    show_report(Report(), document)
    output = capsys.readouterr().out
    for part in document["parts"]:
        for name in ("rows", "used", "examples", "tokens", "supervised_tokens", "turns", "turns_with_end"):
            assert f"{part[name]:,}" in output
        for reason in part["refused"]:
            assert re.search(rf"{re.escape(reason['reason'])} \({part['name']}: .*│ +{reason['rows']:,} │", output)
    for fault in document["faults"]:
        assert f"{fault['level']}: {fault['what']}" in output
    assert "31 exact, 4 near (held_out.jsonl line 5, 6 and 29 more)" in output


def test_with_json_standard_output_stays_empty(capsys: pytest.CaptureFixture[str]):
    report = Report(as_json=True)
    show_report(report, sound())
    show_examples(report, HARD_EXAMPLES)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "The data is fine." in captured.err
