"""How a one-line error quotes a list of names, or another exception."""

from ... import errors


def some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f", … {len(names) - limit} more" if len(names) > limit else "")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, short enough to stand inside a sentence."""
    return errors.first_line(error)[:200].rstrip(" .")
