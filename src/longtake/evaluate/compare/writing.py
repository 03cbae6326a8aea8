"""The one failure that ends a comparison: its folder cannot be written. Everything else is a note about one row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ...errors import LongtakeError


class StoreError(LongtakeError):
    """The disk is full, or the folder write-protected. What is finished stays; the same command goes on."""


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Around code that writes into the folder: whatever fails there is the folder's failure, not a policy's."""
    try:
        yield
    except StoreError:
        raise
    except LongtakeError as error:
        raise StoreError(str(error)) from error
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        raise StoreError(f"cannot write {what}{error.strerror or error}; finished cells stay, go on later") from error
