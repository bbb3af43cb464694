"""`finetune chat` in the terminal: the loop over questions and commands.

A line that begins with a slash is a command (`commands.py`), any other a question. Ctrl-C ends the answer that is being
given and keeps what was said; at the prompt it asks before it leaves, and a second Ctrl-C leaves at once. Whoever
leaves in another way is first asked for a file if the conversation is not saved. A script is asked nothing. A question
that cannot be answered is reported and not kept, so that the next question finds a conversation that works. After the
engine has failed for good the conversation can still be saved; on leaving, the error is reported and sets the exit
status.
"""

from __future__ import annotations

import time

from finetune.chat.answering import Answering, is_full
from finetune.chat.commands import Commands
from finetune.chat.screen import Screen, stopped_by_interrupt
from finetune.chat.session import Session
from finetune.errors import FinetuneError
from finetune.infer import FinishedEvent, Request


def chat_in_terminal(session: Session, screen: Screen) -> None:
    """Talks until the user leaves or standard input ends.

    Raises:
        EngineError: the engine had failed for good.
    """
    commands = Commands(session, screen)
    screen.say(f"{session.model} of {session.engine.model_path}; /help lists the commands, Ctrl-C stops an answer")
    try:
        _talk(session, screen, commands)
        _offer_to_save(session, screen, commands)
    except (EOFError, KeyboardInterrupt):
        screen.say("")
    if session.engine.failure is not None:
        raise session.engine.failure


def _talk(session: Session, screen: Screen, commands: Commands) -> None:
    """Takes questions and commands until the user leaves.

    Raises:
        KeyboardInterrupt: Ctrl-C where the user is asked whether to leave, or by whoever cannot be asked.
    """
    while not commands.leaving:
        try:
            line = screen.ask().strip()
            request = None
            if line.startswith("/") and "\n" not in line:
                request = commands.run(line)
            elif line:
                request = session.ask(line)
            if request is not None:
                _answer(session, screen, request)
        except FinetuneError as error:
            screen.refuse(error)
        except EOFError:
            screen.say("")
            return
        except KeyboardInterrupt:
            if not screen.is_terminal:
                raise
            lost = ", and the conversation is not saved" if session.is_unsaved else ""
            answer = screen.question(f"\nLeave{lost}? y or Ctrl-C leaves, Enter stays: ")
            if answer.lower() in ("y", "yes"):
                return


def _offer_to_save(session: Session, screen: Screen, commands: Commands) -> None:
    """Asks at a terminal where to save the conversation until it is saved or the answer is nowhere."""
    while session.is_unsaved and screen.is_terminal:
        answer = screen.question("Save the conversation? /save FILE, or Enter leaves without saving: ")
        if answer.lower() in ("", "n", "no"):
            return
        file = "" if answer.lower() in ("y", "yes") else answer
        try:
            commands.run(answer if answer.partition(" ")[0] in ("/save", "/save!") else f"/save {file}")
        except FinetuneError as error:
            screen.refuse(error)


def _answer(session: Session, screen: Screen, request: Request) -> None:
    """Streams an answer, keeps it, and reports its speed.

    Raises:
        EngineError: the answer could not be finished; what was said of it is not kept.
    """
    answering = Answering(session.engine, [request])
    text, times = "", []
    with stopped_by_interrupt(answering.cancel):
        for _, event in answering:
            times.append(time.monotonic())
            piece = event.text if text else event.text.lstrip()
            text += piece
            screen.write(piece)
    assert isinstance(event, FinishedEvent), "the last event of a request"
    if event.error is not None:
        screen.write("\n" if text else "")
        raise event.error
    if text:
        screen.write("\n")
        session.keep(text.strip())
    screen.say(_summary(session, event, times, is_kept=bool(text)))


def _summary(session: Session, end: FinishedEvent, times: list[float], *, is_kept: bool) -> str:
    """Tokens, tokens per second after the first, and why the answer ended if it did not end by itself."""
    made = end.completion_tokens
    said = [f"{made:,} token{'s' * (made != 1)}"]
    tokens = times[:-1]  # the last event is the end
    if len(tokens) > 1 and tokens[-1] > tokens[0]:
        said.append(f"{(len(tokens) - 1) / (tokens[-1] - tokens[0]):.1f} tokens/s")
    if end.reason == "cancelled":
        said.append("stopped")
    elif is_full(session.engine, end):
        said.append(f"the model's maximum of {session.engine.max_length:,} tokens is reached: /reset starts over")
    elif end.reason == "length":
        said.append(f"cut at max_new_tokens={session.sampling.max_new_tokens}")
    if not is_kept:
        said.append("the model said nothing, so the question is not kept")
    return ", ".join(said)
