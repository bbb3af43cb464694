"""`finetune chat` in the terminal: the loop over questions and commands.

A line that begins with a slash is a command (`commands.py`), any other a question. Ctrl-C ends the answer that is being
given and keeps what was said; at the prompt it asks before it leaves, and a second Ctrl-C leaves at once. Whoever
leaves in another way is first asked for a file if the conversation is not saved. A script is asked nothing. A question
that cannot be answered is reported and not kept, so that the next question finds a conversation that works. After the
engine has failed for good the conversation can still be saved; on leaving, the error is reported and sets the exit
status.
"""

from __future__ import annotations

from finetune.chat.answering import Answering
from finetune.chat.commands import Commands
from finetune.chat.screen import Screen, stopped_by_interrupt
from finetune.chat.session import Session
from finetune.errors import FinetuneError
from finetune.infer import Request


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
    [answer] = answering.answers
    shown = 0
    with stopped_by_interrupt(answering.cancel):
        for _ in answering.states():
            screen.write(answer.text[shown:])
            shown = len(answer.text)
    assert answer.end is not None, "the last event of a request"
    screen.write("\n" if answer.text else "")
    if answer.end.error is not None:
        raise answer.end.error
    made = len(answer.tokens)
    said = [f"{made:,} token{'s' * (made != 1)}", *answer.course(session.engine.max_length, starts_over="/reset")]
    if answer.text:
        session.keep(answer.text.strip())
    else:
        said.append("the model said nothing, so the question is not kept")
    screen.say(", ".join(said))
