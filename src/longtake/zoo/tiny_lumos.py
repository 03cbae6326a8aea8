"""The transformer of tiny-lumos: a `LumosForVideoGeneration`, trained as AR-DF says (arXiv 2507.08801).

One pass over a window of frames teaches all of them: the same random part of the content, a tube through time, is
masked in every frame, a frame sees those before it and all of itself, and the loss is that of the masked codes.

    u ~ U(0, 1);  part = max(cos(π u / 2), FLOOR)
"""

import math
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import PreTrainedTokenizerFast

from longtake.hosts.lumos import LumosConfig, LumosForVideoGeneration, LumosGeometry, Vocabulary
from longtake.hosts.lumos.fsq import FSQ
from longtake.hosts.lumos.fsq_tokenizer import FSQTokenizer
from longtake.hosts.lumos.sequence import FIXED, MASKED, OPENING, frame_ids, frame_positions, header, text_positions
from longtake.rope import RotaryTable, mm_rope_table
from longtake.zoo import lanes, tiny_text
from longtake.zoo.stages import Stage, Stop, begun_with, go_on, read_checkpoint
from longtake.zoo.tiny_lumos_clips import ROWS, WINDOW, Library, Window
from longtake.zoo.tiny_lumos_learning import optimizers
from longtake.zoo.tiny_lumos_tokenizer import LEVELS

VOCABULARY = {
    "bos": 0, "frame_end": 1, "frame_begin": 2, "separator": 3, "newline": 4, "mask": 5, "video_begin": 6,
    "integer": 8, "largest": 64, "visual": 128,
}  # fmt: skip
FIRST_WORD = 80  # id of the first word of text
TEXT_TOKENS = 24
FLOOR = 0.5  # least part of a frame's content that is masked, and what is masked of a finished frame
EMPTY = 0.1  # share of windows without text, for guidance
SLIPS = 0.03  # most codes of a window that are other codes of it, as a sampler's slips are
FRIEZE = 0.3  # weight of the rows of landmarks: half of all that moves, and nobody's memory is tested on them
OUTER = ("norm", "embed", "lm_head")  # parts of the names of what Muon is not for
RATE = 3e-3
SHORT = 5  # latent frames of a window in the first part of the training
FIRST_FILMS = 60
FILMS = 1500  # a shelf this large is not outlived

GEOMETRY = LumosGeometry(lanes.SIZE, lanes.SIZE, 1, 1, lanes.FPS, patch=(1, 1, 1))
WORDS = Vocabulary.of(VOCABULARY)


def text_tokenizer() -> PreTrainedTokenizerFast:
    """One id per known word, any case; punctuation is dropped, other words become <unk>."""
    known = {*lanes.SHAPES, "a", "and", "nobody", *(word for words in tiny_text.SYNONYMS.values() for word in words)}
    ids = {word: FIRST_WORD + i for i, word in enumerate(["<unk>", *sorted(known)])}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^a-z]+"), " ")])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def build() -> LumosForVideoGeneration:
    """Untrained: five layers of width 128, four heads of 32 and two of keys."""
    return LumosForVideoGeneration(
        LumosConfig(
            vocab_size=WORDS.visual + math.prod(LEVELS),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            rope_theta=100.0,  # with 16 pairs: what 10,000 gives the first 16 of 32, fine enough to tell columns apart
            vocabulary=VOCABULARY,
            prompt_template="{prompt}",
        )
    )


class Digits(nn.Module):
    """Rows of codes are their own plus one for each of their digits: rare codes learn from their neighbours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        fsq = FSQ(LEVELS)
        starts = torch.tensor([sum(LEVELS[:i]) for i in range(len(LEVELS))])
        self.rows: Tensor
        self.register_buffer("rows", fsq.digits(torch.arange(fsq.codes)) + starts, persistent=False)
        self.table = nn.Parameter(0.02 * torch.randn(sum(LEVELS), width))

    def forward(self, weight: Tensor) -> Tensor:
        """[V, C] → [V, C]."""
        shared = functional.embedding(self.rows, self.table).sum(1)
        return torch.cat((weight[: WORDS.visual], weight[WORDS.visual :] + shared))


def share_digits(model: LumosForVideoGeneration) -> None:
    """While it is trained; `merge_digits` makes plain tables again."""
    for module in (model.model.embed_tokens, model.lm_head):
        parametrize.register_parametrization(module, "weight", Digits(model.config.hidden_size))


def merge_digits(model: LumosForVideoGeneration) -> None:
    """Undo `share_digits`, keeping what the model computes."""
    for module in (model.model.embed_tokens, model.lm_head):
        parametrize.remove_parametrizations(module, "weight")


def train(
    folder: Path, tokenizer: FSQTokenizer, minutes: float, device: str, seed: int, batch: int,
    start: Path | None = None, stop: Stop = go_on,
) -> LumosForVideoGeneration:  # fmt: skip
    """Windows of five latent frames, then of eight. `start` is the checkpoint of another training to begin with."""
    torch.manual_seed(seed)
    model = build().to(device)
    share_digits(model.to(device))
    model.to(device)
    if start is not None:
        _load(start, model, device)
    stage = Stage(
        "transformer", folder, {"model": model}, minutes, RATE, optimizers=optimizers(model, OUTER, RATE),
        recipe={"seed": seed, "batch": batch, "begin": begun_with(start)}, stop=stop,
    )  # fmt: skip
    library = Library(tokenizer, seed + stage.steps)
    library.grow(FIRST_FILMS)
    words = text_tokenizer()
    for share in stage:
        rng = np.random.default_rng([seed, 3, stage.steps])
        library.grow(int(library.films < FILMS and rng.random() < 0.3))
        short = share < 0.35 and start is None
        windows = library.draw(rng, batch * 2 if short else batch, SHORT if short else WINDOW)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss, numbers = loss_of(model, windows, words, rng)
        stage.step(loss, films=library.films, **numbers)
    stage.finish()
    merge_digits(model)
    return model.eval().requires_grad_(False)


def loss_of(
    model: LumosForVideoGeneration, windows: list[Window], words: PreTrainedTokenizerFast, rng: np.random.Generator
) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the masked codes of windows with captions of equal length, and numbers for the log."""
    device = model.model.norm.weight.device
    codes = torch.stack([window.codes for window in windows])  # [B, F, h, w]
    batch, frames, height, width = codes.shape
    text = prompts(windows, words, rng)
    shown = slips(codes, rng)
    content = functional.pad(shown, (0, 1), value=FIXED).flatten(2)  # [B, F, c], newlines behind every row
    tube = torch.stack([tube_mask(content.shape[-1], rng) for _ in windows])  # [B, c]
    content = content.masked_fill(tube[:, None], MASKED)
    ids = frame_ids(content.reshape(batch * frames, 1, 1, height, width + 1), GEOMETRY, WORDS)
    ids = torch.cat((text, ids.view(batch, -1)), 1).to(device)
    phases = torch.stack([_positions(text.shape[1], window.frames) for window in windows])  # [B, N, 3]
    rotary = mm_rope_table(model.config.head_dim, model.config.rope_theta)
    layer = FrameCausal(rotary, rotary.phases(phases.to(device))[:, :, None], text.shape[1], GEOMETRY.tokens_per_frame)
    hidden = model(ids, [layer] * model.config.num_hidden_layers)[:, text.shape[1] :]
    hidden = hidden.unflatten(1, (frames, -1))[:, :, OPENING:-1].unflatten(2, (height, width + 1))[:, :, :, :width]
    learn = torch.zeros(batch, frames)
    for row, window in zip(learn, windows, strict=True):
        row[frames - window.learn :] = 1.0
    weight = learn[:, :, None, None].expand(codes.shape).clone()
    weight[:, :, ::ROWS] *= FRIEZE
    masked = tube.view(batch, 1, height, width + 1)[..., :width].expand(codes.shape)
    picked = (masked & (weight > 0)).to(device)
    error = functional.cross_entropy(
        model.logits(hidden[picked], slice(WORDS.visual, None)).float(), codes.to(device)[picked], reduction="none"
    )
    weight, actors = weight.to(device)[picked], torch.stack([w.actors for w in windows]).to(device)[picked]
    numbers = {
        "nats": float(error.detach().mean()),
        "actor": float((error.detach() * actors).sum() / actors.sum().clamp(min=1)),
        "tokens": float(ids.numel()),
    }
    return (error * weight).sum() / weight.sum(), numbers


def prompts(windows: list[Window], words: PreTrainedTokenizerFast, rng: np.random.Generator) -> Tensor:
    """Ids [B, T] as the host makes them of captions, for takes of any length: nothing can be learnt from the seconds.
    Now and then all are empty."""
    if rng.random() < EMPTY:
        texts: list[list[int]] = [[] for _ in windows]
    else:
        texts = [words(_reworded(lanes.caption(window.shapes), rng), add_special_tokens=False).input_ids
                 for window in windows]  # fmt: skip
        texts = [[WORDS.bos, *text, WORDS.separator] for text in texts]
    rows = []
    for text in texts:
        seconds = int(rng.integers(1, WORDS.largest + 1))
        rows.append([*text, *header(seconds, lanes.FPS if seconds > 1 else int(rng.choice((1, lanes.FPS))), WORDS)])
    return torch.tensor(rows)


def slips(codes: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the windows [B, F, h, w] with a few codes replaced by others of the same window."""
    out = codes.clone().flatten(1)
    for row in out:
        if rng.random() < 0.5:
            wrong = torch.from_numpy(rng.random(len(row)) < rng.uniform(0, SLIPS))
            row[wrong] = row[torch.from_numpy(rng.integers(0, len(row), int(wrong.sum())))]
    return out.view(codes.shape)


def tube_mask(content: int, rng: np.random.Generator) -> Tensor:
    """Which of the content positions [c] are masked, in every frame alike."""
    part = max(math.cos(math.pi * rng.random() / 2), FLOOR)
    mask = torch.zeros(content, dtype=torch.bool)
    mask[torch.from_numpy(rng.permutation(content)[: round(content * part)])] = True
    return mask


class FrameCausal:
    """Attention of a whole window: text sees the text before it, a frame all before it and all of itself.

    phases [B, N, 1, P, 2] of text and frames; one object serves every layer.
    """

    def __init__(self, rotary: RotaryTable, phases: Tensor, prefix: int, frame: int) -> None:
        self.rotary, self.phases, self.prefix, self.frame = rotary, phases, prefix, frame

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        q, k = (self.rotary.rotate(x, self.phases).to(v.dtype).transpose(1, 2) for x in (q, k))
        v = v.transpose(1, 2)  # [B, Hk, N, D]
        q = q.unflatten(1, (k.shape[1], -1))  # [B, Hk, G, N, D]
        n = self.prefix
        future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
        parts = [_attend(q[..., :n, :], k[:, :, :n], v[:, :, :n], future)]
        for begin in range(n, q.shape[3], self.frame):
            end = begin + self.frame
            parts.append(_attend(q[..., begin:end, :], k[:, :, :end], v[:, :, :end]))
        return torch.cat(parts, 3).flatten(1, 2).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
    # Spelled out: for short sequences the backward pass of the fused CPU kernel takes several times as long.
    groups = q.shape[2]
    scores = (q * q.shape[-1] ** -0.5).flatten(2, 3) @ k.transpose(2, 3)  # [B, Hk, G n, K]
    if hidden is not None:
        scores = scores.masked_fill(hidden.repeat(groups, 1), -torch.inf)
    return (scores.softmax(-1) @ v).unflatten(2, (groups, -1))


def _positions(prefix: int, frames: tuple[int, ...]) -> Tensor:
    # [N, 3] of text and of frames at these temporal positions
    return torch.cat([text_positions(prefix)[0], *(frame_positions(GEOMETRY, prefix, frame)[0] for frame in frames)])


def _reworded(caption: str, rng: np.random.Generator) -> str:
    out = []
    for word in caption.replace(",", "").split():
        choices = tiny_text.SYNONYMS.get(word, ())
        draw = rng.random()
        out.append("something" if draw < 0.02 else str(rng.choice(choices)) if choices and draw < 0.2 else word)
    return " ".join(out)


def _load(checkpoint: Path, model: LumosForVideoGeneration, device: str) -> None:
    # a stage's averaged weights
    state = read_checkpoint(checkpoint, device)
    model.load_state_dict(state["modules"]["model"])
    with torch.no_grad():
        torch._foreach_copy_(list[Tensor](model.parameters()), state["average"])
