"""What a user did wrong, said in one line: what was given, what is accepted, what to do."""


class LongtakeError(ValueError):
    """A wrong input. The command line prints the message and exits with code 2."""


class PlanError(LongtakeError):
    """A policy's plan cannot be made true: it names what is not there, or keeps more than its `capacity` promised."""


class NonFiniteError(RuntimeError):
    """A chunk came out with NaN or infinity; it was not committed, so the session still holds the state before it."""


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; of one that says nothing, its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
