"""Prompts into the hidden states of a text encoder of the T5 kind, and what becomes of the encoder afterwards."""

from __future__ import annotations

import gc
import html
import re
from collections.abc import Sequence
from threading import RLock
from typing import Any

import ftfy
import torch
from torch import Tensor

from ..errors import LongtakeError

TEXT_ENCODER_FATES = ("offload", "keep", "free")  # after a prompt is encoded


class PromptReader:
    """The part of a host that has a text encoder and its tokenizer, either of which may be missing."""

    name: str
    device: torch.device
    lock: RLock
    text_encoder: Any
    tokenizer: Any
    after_encoding: str | None  # one of `TEXT_ENCODER_FATES`; None: the encoder stays wherever its owner put it

    @torch.no_grad()
    def read(self, prompts: Sequence[str], *, padding: str, limit: int, dtype: torch.dtype, instead: str) -> Tensor:
        """Hidden states [B, T, d] on the host's device, zero where there is padding ("max_length": to `limit` tokens,
        or "longest"). Raises LongtakeError, which says what prompt_embeds are taken `instead`, if nothing can read."""
        if self.text_encoder is None or self.tokenizer is None:
            raise LongtakeError(
                f"{self.name} has no text encoder (any more): pass prompt_embeds of shape {instead}, or load with "
                "text_encoder='offload'"
            )
        tokens = self.tokenizer(
            [clean(p) for p in prompts], padding=padding, max_length=limit, truncation=True, add_special_tokens=True,
            return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        with self.lock:
            if self.after_encoding is not None:
                self.text_encoder.to(self.device)
            mask = tokens.attention_mask.to(self.text_encoder.device)
            hidden = self.text_encoder(tokens.input_ids.to(mask.device), mask).last_hidden_state
            return (hidden * mask.unsqueeze(-1).to(hidden)).to(self.device, dtype)

    def prompts_encoded(self) -> None:
        """No more prompts for now: the encoder goes where it is meant to be."""
        if self.text_encoder is None or self.after_encoding not in ("offload", "free"):
            return
        if self.after_encoding == "free":
            self.text_encoder = None
            gc.collect()
        elif self.device.type != "cpu":
            self.text_encoder.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def clean(prompt: str) -> str:
    """Mended unicode, HTML unescaped twice, single spaces."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()
