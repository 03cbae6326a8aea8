"""The measured decay of attention as a note in a model's description, longtake.json: put in and taken out of its text
without touching anything else of it, so that a description is known by the same bytes with the note and without."""

from __future__ import annotations

import re

_NOTE = re.compile(r'"decay":\s*(null|-?[0-9][0-9.eE+-]*)')
_LAST = re.compile(r',\s*"decay":\s*-?[0-9][0-9.eE+-]*(\s*\}\s*)$')


def with_decay(text: str, rho: float) -> str:
    """The description with the note, in the place of an older one or of null, else at the end."""
    if _NOTE.search(text):
        return _NOTE.sub(f'"decay": {rho!r}', text, count=1)
    body, brace, rest = text.rpartition("}")
    return f'{body.rstrip()},\n  "decay": {rho!r}\n{brace}{rest}'


def without_decay(text: str) -> str:
    """The description as it was before `with_decay`."""
    return _NOTE.sub('"decay": null', _LAST.sub(r"\1", text), count=1)
