"""From what a user holds (a name, a folder, a Hub id, a pipeline object) to a host."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ..errors import LongtakeError
from .base import CONFIG_NAME, Host, HostConfig
from .convert import FAMILIES
from .convert.wording import first_line
from .lumos import loading as lumos
from .prompts import TEXT_ENCODER_FATES
from .skyreels import SkyReels, diffusion_forcing, settings
from .wan import CausalWan

# diffusers-format conversions of causal checkpoints on the Hub, which carry no longtake.json
KNOWN_CAUSAL = {
    "gueraf/Self-Forcing-diffusers": "self-forcing",
    "toilaluan/self-forcing-diffusers": "self-forcing",
}


def embedded() -> dict[str, Path]:
    """The models inside the package, by name."""
    zoo = Path(str(resources.files("longtake") / "zoo"))
    return {p.parent.name: p.parent for p in sorted(zoo.glob(f"*/{CONFIG_NAME}"))}


def load(
    source: str | Path | Any, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None,
    causal: bool | str | None = None, text_encoder: str = "offload", tokenizer: str | Path | None = None,
    allow_torchscript: bool = False,
) -> Host:  # fmt: skip
    """A host from the name of an embedded model, a folder in diffusers format, a Hub id, or a pipeline object.

    `causal` says that the weights are causal when nothing else does: True (Self-Forcing's settings) or the name of a
    family (self-forcing, causal-forcing, longlive, …). `dtype` defaults to bfloat16 on a GPU and float32 on a CPU;
    `device` to the first GPU there is. `text_encoder` says what becomes of it once prompts are encoded: "offload" keeps
    it in host memory, "keep" on the device (UMT5-XXL: 11 GB), "free" nowhere, so that no prompt can follow.

    A folder as Lumos-1 is published loads too. `tokenizer` is then the folder of its video tokenizer,
    Cosmos-Tokenizer-DV4x8x8; that is TorchScript, which runs code, so `allow_torchscript` must say that it is trusted.

    Raises LongtakeError for a missing or unreadable model, and for a bidirectional one.
    """
    if hasattr(source, "transformer") and hasattr(source, "vae"):
        if device is not None or dtype is not None:
            raise LongtakeError("a pipeline keeps its own device and dtype: change them with pipe.to(…), before load")
        return _from_pipeline(source, causal)
    if not isinstance(source, str | Path):
        raise LongtakeError(
            f"a {type(source).__name__} is no model: give the name of an embedded model, a folder in diffusers format, "
            "a Hub id, or a pipeline object"
        )
    device = _device(device)
    dtype = _dtype(dtype, device)
    name = str(source)
    folder = find(name, causal)
    fetched = folder is None and name.startswith(lumos.REPOSITORY)
    if fetched:
        folder = lumos.download(name)
    if folder is not None and lumos.recognised(folder):
        return lumos.from_folder(
            folder, name, device, dtype, tokenizer=tokenizer, allow_torchscript=allow_torchscript, fetch=fetched
        )
    if tokenizer is not None or allow_torchscript:
        raise LongtakeError(f"{name} is no Lumos-1 model: it takes no video tokenizer of its own")
    if folder is None:
        folder = _download(name)
    from .magi.files import is_magi, load_magi

    if is_magi(folder):
        if text_encoder not in TEXT_ENCODER_FATES:
            raise LongtakeError(f"text_encoder={text_encoder!r}: use one of {', '.join(TEXT_ENCODER_FATES)}")
        return load_magi(folder, name, device, dtype, text_encoder)
    config = _config(name, folder, causal)
    return _from_folder(folder, config, name, device, dtype, text_encoder)


def find(name: str, causal: bool | str | None = None) -> Path | None:
    """The folder of the model that `load` is given by this name; None for a Hub id that it would fetch. Reads no file
    and fetches nothing. Raises LongtakeError where there is neither."""
    folder = embedded().get(name) or Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith(lumos.REPOSITORY):
        return None
    if folder.is_file():
        raise LongtakeError(
            f"{folder} is a file: make a model folder of it with `longtake convert {folder} OUT --base WAN`"
        )
    if not _looks_like_hub_id(name):
        names = ", ".join(embedded()) or "none"
        raise LongtakeError(
            f"no model {name!r}: give an embedded model ({names}), a folder in diffusers format, or a Hub id"
        )
    if causal is None and name not in KNOWN_CAUSAL and not diffusion_forcing(name):
        raise LongtakeError(
            f"there is no folder {name}, and as a Hub id it is not known to be causal, so nothing was fetched: "
            f"check the path, use {' or '.join(KNOWN_CAUSAL)}, or say causal=True (--causal) to fetch it"
        )
    return None


def _config(name: str, folder: Path | None, causal: bool | str | None) -> HostConfig:
    """How the weights are run: what stands beside them, or what the user says; `folder` is None for a pipeline of no
    folder."""
    if folder is not None and (folder / CONFIG_NAME).exists():
        config = HostConfig.read(folder)
        if config.causal:
            return config
    if folder is not None and diffusion_forcing(folder):
        return settings(name, json.loads((folder / "transformer" / "config.json").read_text()))
    family = KNOWN_CAUSAL.get(name) if causal is None else ("self-forcing" if causal is True else causal)
    if not family:
        if folder is not None and not (folder / "model_index.json").exists() and not (folder / "transformer").is_dir():
            raise LongtakeError(f"{folder} is not a model folder: it has no model_index.json and no transformer/")
        raise LongtakeError(
            f"{name} is a bidirectional model as far as its files say, a rollout needs causal weights: use "
            f"{' or '.join(KNOWN_CAUSAL)}, convert a checkpoint with `longtake convert`, or say causal=True (--causal) "
            "if these weights are causal"
        )
    known = [name for name, preset in FAMILIES.items() if preset.host == "wan"]
    if family not in known:
        raise LongtakeError(f"causal={family!r}: use True or one of {', '.join(known)}")
    return FAMILIES[family].config()


def _from_folder(
    folder: Path, config: HostConfig, name: str, device: torch.device, dtype: torch.dtype, after_encoding: str
) -> Host:
    from diffusers import AutoencoderKLWan, SkyReelsV2Transformer3DModel, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5EncoderModel

    from ..compressors import load_compressor

    if after_encoding not in TEXT_ENCODER_FATES:
        raise LongtakeError(f"text_encoder={after_encoding!r}: use one of {', '.join(TEXT_ENCODER_FATES)}")
    kinds = {"wan": (WanTransformer3DModel, CausalWan), "skyreels": (SkyReelsV2Transformer3DModel, SkyReels)}
    if config.host not in kinds:
        raise LongtakeError(f"{name}: host {config.host!r} is not known to this version; known: {', '.join(kinds)}")
    network, kind = kinds[config.host]
    if not (folder / "transformer").is_dir():
        raise LongtakeError(f"{folder} has no transformer/: a model folder in diffusers format is needed")
    try:
        options: dict[str, Any] = {"local_files_only": True}
        transformer, report = network.from_pretrained(
            folder, subfolder="transformer", torch_dtype=dtype, output_loading_info=True, **options
        )
        if absent := report["missing_keys"]:  # diffusers would go on with random values in their place
            raise LongtakeError(f"transformer/ lacks {len(absent)} of its weights, {sorted(absent)[0]} among them")
        vae = text_encoder = tokenizer = None
        if (folder / "vae").is_dir():
            vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", torch_dtype=dtype, **options)
        if (folder / "text_encoder").is_dir():
            text_encoder = UMT5EncoderModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", **options)
    except Exception as error:  # loaders raise anything from OSError to SafetensorError
        raise LongtakeError(f"{folder} cannot be loaded: {first_line(error)}") from error
    own = (folder / "compressor").is_dir()
    compressor = load_compressor(folder / "compressor", torch_dtype=dtype) if own else None
    for part in (transformer, vae, text_encoder, compressor):
        if part is not None:
            part.requires_grad_(False).eval()
    transformer.to(device=device)
    for part in (vae, compressor):
        if part is not None:
            part.to(device)
    host = kind(
        transformer, config, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, name=name,
        after_encoding=after_encoding, compressor=compressor,
    )  # fmt: skip
    if compressor is not None:
        compressor.check(host)
    return host


def _from_pipeline(pipe: Any, causal: bool | str | None) -> Host:
    kind = type(pipe.transformer).__name__
    hosts = {"WanTransformer3DModel": CausalWan, "SkyReelsV2Transformer3DModel": SkyReels}
    if kind not in hosts:
        raise LongtakeError(f"a pipeline with a {kind} is not supported: give one with a {' or a '.join(hosts)}")
    if getattr(pipe, "transformer_2", None) is not None:
        raise LongtakeError(
            "a pipeline with two transformers (Wan2.2 A14B) is not supported: give one with a single one"
        )
    name = str(getattr(pipe.config, "_name_or_path", None) or getattr(pipe, "_name_or_path", "") or type(pipe).__name__)
    folder = Path(name) if Path(name).is_dir() else None
    sky = kind == "SkyReelsV2Transformer3DModel"
    config = settings(name, dict(pipe.transformer.config)) if sky else _config(name, folder, causal)
    for block in pipe.transformer.blocks:
        if hasattr(block.attn1.processor, "view"):
            raise LongtakeError(
                "this pipeline's transformer already belongs to a session's host: share that host, or release it"
            )
    pipe.transformer.eval()
    return hosts[kind](
        pipe.transformer, config, vae=pipe.vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, name=name
    )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = [
            "model_index.json",
            CONFIG_NAME,
            "transformer/*",
            "vae/*",
            "text_encoder/*",
            "tokenizer/*",
            "scheduler/*",
        ]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise LongtakeError(f"{name} cannot be fetched from the Hub: {first_line(error)}") from error


def _looks_like_hub_id(name: str) -> bool:
    owner, _, model = name.partition("/")
    return bool(owner and model) and "/" not in model and not name.startswith((".", "/", "~"))


def _device(device: str | torch.device | None) -> torch.device:
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:  # an unknown name, or a kind this torch is built without
        raise LongtakeError(f"device {str(device)!r} cannot be used: {first_line(error)}") from error
    return found


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype not in known and dtype not in known.values():
        raise LongtakeError(f"dtype {str(dtype)!r}: use one of {', '.join(known)}")
    return known.get(dtype, dtype)  # type: ignore[arg-type]
