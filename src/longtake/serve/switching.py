"""A new prompt in a running take, and what becomes of its past."""

from __future__ import annotations

from ..errors import LongtakeError
from ..plan import Drop
from ..samplers.staggered import Stagger
from ..session import Session


def switch(session: Session, text: str, mode: str | None) -> str:
    """Put a prompt into force from the next chunk on; returns the mode that was used.

    keep leaves the history as it is; recache rewrites it under the new prompt; flush forgets all but its ends (as the
    policy says); cut forgets all of it and begins to decode anew, which makes a cut to another scene.
    Raises LongtakeError where a take cannot do that; the prompt is then as before.
    """
    mode = mode or session.policy.prompt_switch
    if mode != "keep" and isinstance(session.sampler, Stagger):
        raise LongtakeError(f"mode {mode!r}: chunks of this model are in flight together, its past stays: use keep")
    session.prompt = text
    if mode == "recache":
        session.rebuild()
    elif mode == "flush":
        session.history.forget(session.policy.flush(session.history.table()))
    elif mode == "cut":
        blocks = [b for b in session.history.table().blocks if b.span]  # a prompt in the sequence spans no frames
        session.history.forget([Drop(b.id, form) for b in blocks for form in b.forms])
        session.decoder = None if session.decoder is None else session.host.decoder()
    return mode
