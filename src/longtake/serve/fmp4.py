"""Fragmented MP4 (ISO/IEC 14496-12, -15) of one H.264 track, one frame per fragment, written box by box.

Of our own, because a muxer keeps the clock and the sequence of one file: here the same frames go to viewers who joined
at different times and to a recording that begins at zero, and a parked take goes on where its clock stood.
"""

from __future__ import annotations

import struct
from fractions import Fraction

_UNITY = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
_KEY, _DELTA = 0x02000000, 0x01010000  # depends on nothing; depends on others and is no sync sample
_SPS, _PPS, _IDR = 7, 8, 5


def units(stream: bytes) -> list[bytes]:
    """The NAL units of an Annex B byte stream, without start codes."""
    return [part.rstrip(b"\0") for part in stream.split(b"\0\0\1") if part.rstrip(b"\0")]


def sample(stream: bytes) -> tuple[bytes, bool]:
    """One encoded frame for an MP4: slices behind their lengths; and whether it is a key frame."""
    slices = [unit for unit in units(stream) if 1 <= unit[0] & 31 <= _IDR]
    return b"".join(struct.pack(">I", len(unit)) + unit for unit in slices), any(u[0] & 31 == _IDR for u in slices)


class Track:
    """What the boxes need to know: picture size, frame rate, and the encoder's parameter sets (Annex B)."""

    def __init__(self, width: int, height: int, fps: float, extradata: bytes) -> None:
        rate = Fraction(fps).limit_denominator(1001)
        self.width, self.height = width, height
        self.timescale, self.duration = rate.numerator * 1000, rate.denominator * 1000  # ticks a second, a frame
        self._sps = next(unit for unit in units(extradata) if unit[0] & 31 == _SPS)
        self._pps = next(unit for unit in units(extradata) if unit[0] & 31 == _PPS)

    @property
    def codec(self) -> str:
        """As in RFC 6381: avc1 with profile, constraints and level."""
        return f"avc1.{self._sps[1:4].hex()}"

    def header(self) -> bytes:
        """The initialisation segment."""
        ftyp = _box(b"ftyp", b"iso5", struct.pack(">I", 512), b"iso5iso6avc1mp41")
        mvhd = _full(b"mvhd", 0, 0, struct.pack(">5IHxx8x", 0, 0, self.timescale, 0, 0x10000, 0x100), _UNITY,
                     bytes(24), struct.pack(">I", 2))  # fmt: skip
        tkhd = _full(b"tkhd", 0, 3, struct.pack(">5I8x4H", 0, 0, 1, 0, 0, 0, 0, 0, 0), _UNITY,
                     struct.pack(">2I", self.width << 16, self.height << 16))  # fmt: skip
        mdhd = _full(b"mdhd", 0, 0, struct.pack(">4I2H", 0, 0, self.timescale, 0, 0x55C4, 0))
        hdlr = _full(b"hdlr", 0, 0, struct.pack(">I4s12x", 0, b"vide"), b"video\0")
        dinf = _box(b"dinf", _full(b"dref", 0, 0, struct.pack(">I", 1), _full(b"url ", 0, 1)))
        avcc = _box(b"avcC", b"\1", self._sps[1:4], b"\xff\xe1", struct.pack(">H", len(self._sps)), self._sps, b"\1",
                    struct.pack(">H", len(self._pps)), self._pps)  # fmt: skip
        entry = _box(b"avc1", struct.pack(">6xH16x2H", 1, self.width, self.height),
                     struct.pack(">3IH32xHh", 0x480000, 0x480000, 0, 1, 24, -1), avcc)  # fmt: skip
        stbl = _box(
            b"stbl", _full(b"stsd", 0, 0, struct.pack(">I", 1), entry), _full(b"stts", 0, 0, bytes(4)),
            _full(b"stsc", 0, 0, bytes(4)), _full(b"stsz", 0, 0, bytes(8)), _full(b"stco", 0, 0, bytes(4)),
        )  # fmt: skip
        minf = _box(b"minf", _full(b"vmhd", 0, 1, bytes(8)), dinf, stbl)
        trak = _box(b"trak", tkhd, _box(b"mdia", mdhd, hdlr, minf))
        mvex = _box(b"mvex", _full(b"trex", 0, 0, struct.pack(">5I", 1, 1, 0, 0, 0)))
        return ftyp + _box(b"moov", mvhd, trak, mvex)

    def fragment(self, data: bytes, key: bool, frame: int) -> bytes:
        """One frame, the `frame`-th of its timeline from 0."""
        mfhd = _full(b"mfhd", 0, 0, struct.pack(">I", (frame + 1) & 0xFFFFFFFF))
        tfhd = _full(b"tfhd", 0, 0x020000, struct.pack(">I", 1))  # offsets count from this moof
        tfdt = _full(b"tfdt", 1, 0, struct.pack(">Q", frame * self.duration))
        row = struct.pack(">3I", self.duration, len(data), _KEY if key else _DELTA)
        trun = lambda offset: _full(b"trun", 0, 0x000701, struct.pack(">Ii", 1, offset), row)
        size = len(_box(b"moof", mfhd, _box(b"traf", tfhd, tfdt, trun(0))))
        return _box(b"moof", mfhd, _box(b"traf", tfhd, tfdt, trun(size + 8))) + _box(b"mdat", data)


def boxes(data: bytes) -> list[tuple[str, int, int]]:
    """(name, start, end) of the complete boxes at the top of `data`."""
    found, at = [], 0
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if size < 8 or at + size > len(data):
            break
        found.append((name.decode("latin1"), at, at + size))
        at += size
    return found


def _box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def _full(kind: bytes, version: int, flags: int, *parts: bytes) -> bytes:
    return _box(kind, struct.pack(">I", version << 24 | flags), *parts)
