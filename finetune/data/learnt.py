"""Which turns of a conversation are learnt.

Why: a row may hold answers that nobody should learn. How: a turn is learnt when it is the assistant's, the row does not
say `train: false` for it, and `loss_on` takes it: all of them; the last; or the completion, which is what follows the
last turn with `train: false` (the prompt of a row of prompt and completion), and the last one where no turn has that.
Leaves out tokens: `encoding.py` finds those of a turn.
"""

from __future__ import annotations

from finetune.data.rows import LossOn, Turns


def learnt_turns(messages: Turns, loss_on: LossOn) -> list[bool]:
    """For each assistant turn, in order, whether it is learnt."""
    numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    untrained = [number for number, message in enumerate(messages) if not message.get("train", True)]
    first = 0
    if loss_on == "completion" and untrained:
        first = untrained[-1] + 1
    elif loss_on != "all" and numbers:
        first = numbers[-1]
    return [number >= first and messages[number].get("train", True) for number in numbers]
