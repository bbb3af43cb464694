"""OpenAI's HTTP interface over the engine, in the engine's process.

Why: what speaks to OpenAI's servers should speak to what was trained here without a change, and get exactly what the
engine answers. How: `request_body.py` and `prompts.py` make engine requests of a body, `answers.py` brings the engine's
events to the event loop, `choices.py` has the two shapes of an answer, `replies.py` sends it, `admission.py` counts and
refuses, `auth.py` stands before every path, `app.py` has the paths, `server.py` starts and stops.

Leaves out: calling tools, constrained formats, images, penalties by count; they are refused by name, not ignored.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
