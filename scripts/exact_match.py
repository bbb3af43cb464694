"""Counts how often models answer held-out conversations word for word, and shows the counts and some examples.

    python scripts/exact_match.py base=FOLDER tuned=FOLDER --data heldout.jsonl --json FILE

Every conversation ends with the expected answer; the rest of it is the prompt, in the model's own chat template. Models
run in the engine that `finetune generate` and `finetune serve` use, greedy, experts in 4 bits. White space around an
answer does not count, every other character does.
"""

from __future__ import annotations

import argparse
import gc
import json
import queue
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.cli.reporting import quiet_libraries
from finetune.console import Report
from finetune.errors import FinetuneError

quiet_libraries(debug=False)

from finetune.infer import Engine, EngineSettings, Event, FinishedEvent, Request, Sampling  # noqa: E402
from finetune.recipe.origin import provenance  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER", help="base, merged or adapter folder")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with `messages`")
    parser.add_argument("--examples", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write every answer here")
    args = parser.parse_args()
    if unnamed := [model for model in args.models if "=" not in model]:
        parser.error(f"{unnamed[0]}: write NAME=FOLDER")
    conversations = [json.loads(line)["messages"] for line in args.data.read_text(encoding="utf-8").splitlines()]
    prompts, expected = [m[:-1] for m in conversations], [m[-1]["content"].strip() for m in conversations]
    answers: dict[str, list[str]] = {}
    for model in args.models:
        name, _, folder = model.partition("=")
        with Engine.load(folder, settings=EngineSettings(max_batch=min(len(prompts), 64))) as engine:
            answers[name] = answer_all(engine, prompts, Sampling(args.max_new_tokens))
        del engine  # and its model, before the next one's comes
        gc.collect()
    right = {name: sum(map(str.__eq__, given, expected)) for name, given in answers.items()}
    report, of = Report(), len(expected)
    asked = [messages[-1]["content"] for messages in prompts]
    rows = list(zip(asked, *answers.values(), expected, strict=True))[: args.examples]
    report.prose_table(f"The first {len(rows)} of {of} held-out prompts", ("prompt", *answers, "expected"), rows)
    counted = [(name, f"{count} of {of}", f"{count / of:.0%}") for name, count in right.items()]
    report.table(f"Right to the letter, of {of} held-out prompts", ("model", "right", "share"), counted)
    if args.json is not None:
        document = {
            "bench": "exact_match",
            "prompts": of,
            "right": right,
            "expected": expected,
            "answers": answers,
            **provenance(),
        }
        args.json.write_text(json.dumps(document) + "\n", encoding="utf-8")


def answer_all(engine: Engine, prompts: Sequence[Sequence[Mapping[str, str]]], sampling: Sampling) -> list[str]:
    """One answer a conversation, in their order; as many at once as the engine's batch takes.

    Raises:
        FinetuneError: a conversation that the template refuses, or an answer that could not be finished.
    """
    submitted: list[queue.SimpleQueue[Event]] = []
    for messages in prompts:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        engine.submit(Request(engine.encode_chat(messages), sampling), events.put)
        submitted.append(events)
    return [_text(events) for events in submitted]


def _text(events: queue.SimpleQueue[Event]) -> str:
    pieces: list[str] = []
    while True:
        event = events.get()
        pieces.append(event.text)
        if isinstance(event, FinishedEvent):
            if event.error is not None:
                raise event.error
            return "".join(pieces).strip()


if __name__ == "__main__":
    try:
        main()
    except FinetuneError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
