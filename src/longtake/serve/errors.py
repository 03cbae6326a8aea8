"""Refusals: each knows its HTTP status, and says what would be accepted."""

from __future__ import annotations

from ..errors import LongtakeError
from .protocol import Fits, Problem


class Refused(LongtakeError):
    """A request that is not served. `status` is HTTP's, `code` a word for programs."""

    def __init__(self, status: int, code: str, message: str, retry: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.retry = status, code, retry

    @property
    def problem(self) -> Problem:
        return Problem(code=self.code, message=str(self))


class NoRoom(Refused):
    """A session that does not fit beside the others now."""

    def __init__(self, needed: int, free: int, fits: Fits | None = None) -> None:
        hint = f"; policy {fits.policy} would fit" if fits else "; nothing of this kind would fit now"
        super().__init__(503, "no_room", f"this session needs {needed} bytes, {max(0, free)} are free{hint}", retry=10)
        self.needed, self.free, self.fits = needed, max(0, free), fits

    @property
    def problem(self) -> Problem:
        return Problem(
            code=self.code, message=str(self), needed_bytes=self.needed, free_bytes=self.free, fits=self.fits
        )
