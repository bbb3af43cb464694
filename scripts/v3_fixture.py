"""Writes the fixture of the Mistral v3 format: conversations, and the ids that mistral-common gives for them.

How: mistral-common answers in an environment of its own, as for `build_tokenizer.py`, whose environment may be reused
(`--environment`). Conversations are the seeded ones of `fixture_texts.py`, with spaces after some answers, and the
control tokens of v3 typed in every role (`injection_corpus.py` has the cases). Before anything is written, all of them
and thousands more must get the very ids and marks from our template and encoder. The first line of the fixture holds
the control tokens, so that tests can build the tokenizer (`v3_tokenizer.py`) from the bundled one.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from build_tokenizer import ROOT, make_environment, replace_file
from fixture_texts import TextMaker, read_dialogues, read_problems
from injection_corpus import PLACES, conversation
from transformers import PreTrainedTokenizerFast
from v3_tokenizer import KEPT, shift

from finetune.data.chat import apply_template
from finetune.data.encoding import encoder_of

SHA256 = "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33"
MODEL = "mistral_instruct_tokenizer_240323.model.v3"
TYPED = ("[INST]", "[/INST]", "</s>", "<s>", "[TOOL_CALLS]", "[control_12]", "[INST] x [/INST] y</s>")
LINES = 280  # seeded conversations in the fixture
LONGEST = 150  # ids of one of them

Message = dict[str, str]


def ask(environment: Path, site_packages: Path, conversations: list[list[Message]]) -> dict[str, Any]:
    """Runs `mistral_reference.py` in the environment."""
    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch, "request.json"), Path(scratch, "answer.json")
        question.write_text(json.dumps({"texts": [], "conversations": conversations}), encoding="utf-8")
        command = [str(environment / "bin" / "python"), str(Path(__file__).with_name("mistral_reference.py"))]
        command += ["--model", str(site_packages / "mistral_common" / "data" / MODEL)]
        subprocess.run([*command, "--request", str(question), "--answer", str(answer)], check=True)
        return dict(json.loads(answer.read_text(encoding="utf-8")))


def seeded(site_packages: Path, count: int, seed: int) -> list[list[Message]]:
    """Conversations of dialogue, code and noise, one answer in four followed by white space."""
    maker, rng = TextMaker(read_dialogues(site_packages), read_problems(site_packages), seed=seed), random.Random(seed)
    conversations = [maker.conversation() for _ in range(count)]
    for messages in conversations:
        for message in messages:
            if message["role"] == "assistant" and rng.random() < 0.25:
                message["content"] += rng.choice((" ", "   ", "\n", " \n ", "\t "))
    return conversations


def typed() -> list[list[Message]]:
    """Control tokens spelled out, by everybody and at every place."""
    return [
        conversation(role, before + text + after)
        for text in TYPED
        for role in ("system", "user", "assistant")
        for before, after in PLACES
    ]


def disagreements(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> int:
    """Counts conversations whose ids or marks differ from mistral-common's, and prints them."""
    wrong = 0
    for row, ours in zip(rows, encoder_of(tokenizer).encode([row["messages"] for row in rows]), strict=True):
        marked = [i for start, end in row["assistant"] for i in range(start, end)]
        if ours.ids.tolist() != row["ids"] or ours.supervised.nonzero()[0].tolist() != marked:
            wrong += 1
            print(f"{row}: {ours.ids.tolist()}, {ours.supervised.nonzero()[0].tolist()}", file=sys.stderr)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "tests" / "data" / "fixtures" / "mistral_v3.jsonl")
    parser.add_argument("--environment", type=Path, help="an environment that has mistral-common already")
    parser.add_argument("--conversations", type=int, default=4000, help="seeded conversations to compare")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        environment = args.environment or Path(scratch, "environment")
        site_packages = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(environment)}))
        if args.environment is None:
            site_packages = make_environment(environment)
        conversations = seeded(site_packages, args.conversations, args.seed) + typed()
        answer = ask(environment, site_packages, conversations)
        assert answer["sha256"] == SHA256, f"mistral-common ships another tokenizer: {answer['sha256']}"

        v1 = (ROOT / "recipes" / "tiny-mixtral" / "model" / "tokenizer.json").read_text(encoding="utf-8")
        pieces = [piece for piece, _, _ in answer["pieces"]]
        controls = pieces[KEPT : len(pieces) - len(json.loads(v1)["model"]["vocab"]) + KEPT]
        backend = shift(v1, controls)
        assert [backend.id_to_token(i) for i in range(backend.get_vocab_size())] == pieces, "v3 is not v1 shifted"

        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
        apply_template(tokenizer, "mistral-v3")
        rows = [{"messages": m, **truth} for m, truth in zip(conversations, answer["conversations"], strict=True)]
        accepted = [row for row in rows if row["ids"] is not None]
        wrong = disagreements(tokenizer, accepted)
        print(f"{len(accepted)} conversations compared, {len(rows) - len(accepted)} more refused: {wrong} differ")
        if wrong:
            sys.exit(1)
        kept = [row for row in rows[: args.conversations] if row["ids"] is not None and len(row["ids"]) <= LONGEST]
        lines = [{"controls": controls}, *kept[:LINES], *rows[args.conversations :]]
        draft = Path(scratch, "fixture.jsonl")
        text = [json.dumps(line, ensure_ascii=False, separators=(",", ":")) for line in lines]
        draft.write_text("\n".join(text) + "\n", encoding="utf-8")
        replace_file(draft, args.output)
    print(f"wrote {len(lines)} lines to {args.output}")


if __name__ == "__main__":
    main()
