"""Keys and values of tokens in all layers, in one storage form: as they were computed, or quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import attend_history, gather_rotate
from ..rope import RotaryTable
from .quantised import Quantised


class Memory:
    """`k`, `v` [L, B, R, H, D] of R tokens. Quantised, they are codes, with `k_scale`, `v_scale` [L, B, R, H] beside
    them; read, they are of `dtype` in any case.

    Indices `at` are those of [B, R, H] tensors. With `kernels`, Triton reads it where that is asked for by rows.
    """

    def __init__(
        self, size: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device, *, pinned: bool = False,
        form: Quantised | None = None, kernels: bool = False,
    ) -> None:  # fmt: skip
        self.dtype, self.form, self.kernels = dtype, form, kernels
        zeros = lambda size, dtype: torch.zeros(size, dtype=dtype, device=device, pin_memory=pinned)
        self.k, self.v = (zeros(size, dtype if form is None else form.codes) for _ in range(2))
        if form is not None:
            self.k_scale, self.v_scale = (zeros(size[:-1], torch.float32) for _ in range(2))

    @property
    def names(self) -> tuple[str, ...]:
        """Attributes that hold a row per token: what is moved, counted and written to a snapshot."""
        return ("k", "v") if self.form is None else ("k", "v", "k_scale", "v_scale")

    @property
    def kept(self) -> list[Tensor]:
        """The tensors of `names`, tokens on axis 2."""
        return [getattr(self, name) for name in self.names]

    def keys(self, layer: int, at: Any, out: Tensor | None = None) -> Tensor:
        """Un-rotated keys [*at, D]: a view where form and index allow it, else in `out` or memory of its own."""
        if self.form is None:
            return self.k[layer][at]
        return self._unpacked(self.k[layer][at], self.k_scale[layer][at], out)

    def values(self, layer: int, at: Any, out: Tensor | None = None) -> Tensor:
        """Values [*at, D], as `keys`."""
        if self.form is None:
            return self.v[layer][at]
        return self._unpacked(self.v[layer][at], self.v_scale[layer][at], out)

    def copy_values(self, layer: int, at: Any, out: Tensor) -> None:
        """Values [*at, D] into `out`, whatever the form."""
        if self.form is None:
            out.copy_(self.v[layer][at])
        else:
            self.values(layer, at, out)

    def gather(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Un-rotated keys, and values, of `rows` [n] into k and v [B, n, H, D]."""
        if self.form is None:
            torch.index_select(self.k[layer], 1, rows, out=k)
            torch.index_select(self.v[layer], 1, rows, out=v)
            return
        self._unpacked(self.k[layer].index_select(1, rows), self.k_scale[layer].index_select(1, rows), k)
        self._unpacked(self.v[layer].index_select(1, rows), self.v_scale[layer].index_select(1, rows), v)

    def show(self, layer: int, rows: Tensor, phases: Tensor, rotary: RotaryTable, k: Tensor, v: Tensor) -> None:
        """Rows [n] or [B, n], keys turned by phases [n, P, 2] or [B, n, 1, P, 2], into k and v [B, n, H, D], with a
        kernel."""
        keys, k_scale = self._raw("k", layer)
        values, v_scale = self._raw("v", layer)
        gather_rotate(keys, k_scale, rows, phases, rotary, k)
        gather_rotate(values, v_scale, rows, None, rotary, v)

    def attend(
        self, layer: int, rows: Tensor, phases: Tensor, rotary: RotaryTable, k: Tensor, v: Tensor, q: Tensor
    ) -> Tensor:
        """Attention of rotated q to rows of a quantised memory and then to k and v [B, m, H, D]: by kernel."""
        keys, k_scale = self._raw("k", layer)
        values, v_scale = self._raw("v", layer)
        assert k_scale is not None and v_scale is not None
        return attend_history(q, (keys, k_scale), (values, v_scale), rows, phases, rotary, k, v)

    def write(self, layer: int, at: Any, k: Tensor, v: Tensor) -> None:
        """Store k and v [*at, D], which this quantises if the form says so."""
        if self.form is None:
            self.k[layer][at], self.v[layer][at] = k.to(self.k.dtype), v.to(self.v.dtype)
            return
        self.k[layer][at], self.k_scale[layer][at] = self.form.pack(k)
        self.v[layer][at], self.v_scale[layer][at] = self.form.pack(v)

    def _raw(self, name: str, layer: int) -> tuple[Tensor, Tensor | None]:
        """Codes as numbers, and their scales, of a layer."""
        kept = getattr(self, name)[layer]
        if self.form is None:
            return kept, None
        return kept.view(self.form.number), getattr(self, f"{name}_scale")[layer]

    def _unpacked(self, codes: Tensor, scale: Tensor, out: Tensor | None) -> Tensor:
        assert self.form is not None
        if out is None:
            out = torch.empty(codes.shape, dtype=self.dtype, device=codes.device)
        return self.form.unpack(codes, scale, out)
