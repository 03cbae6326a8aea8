"""The options of the command line, as types: signatures in `commands/` name them, `--help` says these words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

DEFAULT_MODEL = "tiny-shapes"
DEFAULT_SECONDS = 5.0
DTYPES = ("float32", "bfloat16", "float16")
HISTORY_DTYPES = ("int8", "fp8")

Output = Annotated[Path, Option("--output", "-o", help="The MP4 to write; it appears when it is complete.")]
Prompt = Annotated[str | None, Argument(help="What to see; with --resume, what to see from now on.")]
See = Annotated[str | None, Argument(metavar="[PROMPT]", help="What to see.")]
Model = Annotated[
    str | None,
    Option(
        "--model", "-m",
        help="An embedded model, a folder in diffusers format, or a Hub id.", show_default=DEFAULT_MODEL,
    ),
]  # fmt: skip
Policy = Annotated[
    str | None,
    Option(
        "--policy", "-p",
        help="What of the past is kept and seen: NAME[:key=value,…] (see `longtake policies`) or my_file.py:MyPolicy.",
        show_default="the window the model was made for",
    ),
]  # fmt: skip
CompressorSpec = Annotated[
    str | None,
    Option(
        "--compressor", metavar="NAME|DIR",
        help="What makes compressed history, for policies that keep it: low-resolution, mean-pool, or the folder of a "
        "trained one.",
        show_default="the model's own",
    ),
]  # fmt: skip
Reuse = Annotated[
    str,
    Option(
        metavar="SPEC",
        help="Which steps reuse an earlier result: none, flowcache:slow, teacache:fast, replay:LOG, "
        "NAME:key=value,… (see `longtake policies`) or my_file.py:MyReuse.",
    ),
]
ReuseLog = Annotated[
    Path | None, Option(help="Write what was reused, step by step, to this JSON file; --reuse replay:FILE follows it.")
]
Size = Annotated[str | None, Option(metavar="WxH", help="Pixels.", show_default="the model's")]
Seconds = Annotated[
    float | None,
    Option(help="Length of the video, rounded up to whole chunks.", show_default=f"{DEFAULT_SECONDS:g}"),
]
Chunks = Annotated[int | None, Option(help="Length in chunks, instead of --seconds.")]
Seed = Annotated[int | None, Option(help="Start of the random numbers.", show_default="0")]
Picture = Annotated[Path | None, Option("--image", help="First frame; cropped to the size of the video.")]
Steps = Annotated[int | None, Option(help="Denoising steps per chunk.", show_default="the model's")]
Guidance = Annotated[float | None, Option(help="Guidance scale; 1 is none.", show_default="the model's")]
Negative = Annotated[str | None, Option(help="What not to see; needs guidance.")]
PromptSwitch = Annotated[
    list[str] | None,
    Option(
        metavar="SECONDS:PROMPT",
        help="Another prompt from the first chunk that starts at SECONDS or later; repeatable.",
    ),
]
SwitchMode = Annotated[
    str | None,
    Option(
        help="What another prompt does to the past: keep it, recache (computed anew under the new prompt), flush (all "
        "but its beginning and end forgotten) or cut (flush, and a jump in time).",
        show_default="the policy's own way, mostly keep",
    ),
]
Memory = Annotated[
    str | None,
    Option(
        metavar="BYTES",
        help="Fit the policy to a budget for the history, e.g. 500MB, whatever --policy says of the size it chooses; "
        "the view comes on top (see --residency).",
    ),
]
Residency = Annotated[
    str | None,
    Option(
        help="Where the view lives: resident (fast, a second K/V), scratch (one layer's) or alias (none).",
        show_default="resident",
    ),
]
HistoryDtype = Annotated[
    str | None,
    Option(
        help="Keep the past quantised, a byte a number: int8 or fp8; --memory then holds more of it.",
        show_default="the model's dtype",
    ),
]
Device = Annotated[str | None, Option(help="cpu, cuda, cuda:N or mps.", show_default="the first GPU, else the CPU")]
Dtype = Annotated[
    str | None,
    Option(help=f"{DTYPES[0]}, {DTYPES[1]} or {DTYPES[2]}.", show_default="bfloat16 on a GPU, float32 on a CPU"),
]
TextEncoder = Annotated[
    str,
    Option(
        help="Once prompts are encoded: offload (to host memory), keep (on the device) or free (--prompt-switch then "
        "encodes its prompts at the start too).",
    ),
]
VideoTokenizer = Annotated[
    Path | None,
    Option("--tokenizer", metavar="DIR", help="Lumos-1's video tokenizer: the folder of Cosmos-Tokenizer-DV4x8x8."),
]
AllowTorchscript = Annotated[
    bool, Option("--allow-torchscript", help="The files of --tokenizer are trusted: TorchScript runs code when loaded.")
]
Compat = Annotated[
    str | None,
    Option(help="Lumos-1: upstream (the published program, token for token) or fixed.", show_default="the model's"),
]
Threads = Annotated[
    int | None,
    Option(
        metavar="N",
        help="CPU threads.",
        show_default="1 for an embedded model, whose operations are too small to share out; else torch's own",
    ),
]
Causal = Annotated[bool, Option("--causal", help="The weights are causal, though their files do not say so.")]
CausalFamily = Annotated[str | None, Option("--family", help="… and of this family (`longtake models` lists them).")]
Latents = Annotated[
    Path | None, Option(help="Also write the latents, fp32, frame by frame, to this .safetensors file.")
]
Snapshot = Annotated[
    Path | None,
    Option(help="Write the state at the end, or at Ctrl-C, here, for --resume; it may be the same file as --resume."),
]
Resume = Annotated[Path | None, Option(help="Go on from a snapshot; the MP4 holds the continuation only.")]
RayAddress = Annotated[
    str | None,
    Option(
        "--ray-address", metavar="HOST:PORT",
        help="Join this Ray cluster instead; whoever can reach a cluster may run code in it, see the README.",
    ),
]  # fmt: skip
Workers = Annotated[
    int | None,
    Option(metavar="N", min=1, help="Workers on Ray.", show_default="one per GPU, else one per --threads CPUs"),
]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object.")]

Source = Annotated[Path, Argument(metavar="IN", help="A .pt, .pth or .safetensors file, or a folder of shards.")]
ModelFolder = Annotated[Path, Argument(metavar="OUT", help="The folder to make.")]
Base = Annotated[
    str, Option(metavar="WAN", help="The Wan model it was distilled into: a folder or Hub id in diffusers format.")
]
Family = Annotated[
    str | None,
    Option(help="Which published family (`longtake models` lists them).", show_default="by the file's name"),
]
Ema = Annotated[
    bool | None,
    Option(
        "--ema/--no-ema",
        help="Which of the file's two sets of weights.",
        show_default="the one that its authors sample from",
    ),
]
Lora = Annotated[Path | None, Option(help="An adapter to merge.")]
ConvertDtype = Annotated[str, Option(help="bfloat16, float16 or float32.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an earlier conversion at OUT.")]

DemoFolder = Annotated[Path, Argument(metavar="OUT_DIR", help="The folder to make; an earlier demo there is replaced.")]
Prompts = Annotated[
    list[str] | None, Option("--prompt", help="What to see; repeatable.", show_default="three that the model names")
]
Policies = Annotated[
    list[str] | None,
    Option(
        "--policy", "-p", help="A policy to compare, as for `longtake generate`; repeatable.",
        show_default="full history, three windows, and every other method at the same bytes",
    ),
]  # fmt: skip
DemoSeconds = Annotated[
    float | None,
    Option("--seconds", help="Length of each take.", show_default="12, or what two minutes are enough for"),
]

TrainFolder = Annotated[
    Path, Option("--out", metavar="DIR", help="The model folder to write; DIR/work holds checkpoints and numbers.")
]
VaeMinutes = Annotated[float, Option(help="For the video autoencoder.")]
DecoderMinutes = Annotated[float, Option(help="For its decoder alone.")]
ManyMinutes = Annotated[float, Option(help="For text encoder and transformer, at every noise level.")]
FewMinutes = Annotated[float, Option(help="For both once more, at the sampler's four noise levels.")]
TokenizerMinutes = Annotated[float, Option(help="For the video tokenizer.")]
TransformerMinutes = Annotated[float, Option(help="For the transformer, on its codes.")]
Variant = Annotated[str, Option(help="short: seven chunks on end; long: sparse histories of up to 200 latent frames.")]
Begin = Annotated[
    Path | None, Option(metavar="DIR", help="A finished training: take its autoencoder and its many-step stage.")
]
BeginLumos = Annotated[
    Path | None, Option("--begin", metavar="DIR", help="Another training: take its tokenizer, begin with its weights.")
]
BeginMany = Annotated[
    Path, Option("--begin", metavar="DIR", help="A training of tiny-wan: take its autoencoder and its many-step stage.")
]
Batch = Annotated[int, Option(help="Windows of seven chunks a step.")]
LumosBatch = Annotated[int, Option("--batch", help="Windows of eight latent frames a step.")]
TrainSeed = Annotated[int, Option("--seed", help="Start of the random numbers.")]
TrainDevice = Annotated[str, Option("--device", help="cpu or cuda.")]
TrainThreads = Annotated[int | None, Option("--threads", metavar="N", help="CPU threads.", show_default="torch's own")]

CompressorFolder = Annotated[
    Path,
    Option("--out", metavar="DIR", help="Gets compressor/ and training.json; DIR/work holds checkpoints and numbers."),
]
TrainMinutes = Annotated[float, Option("--minutes", help="For the whole training; at least 0.25.")]
RolloutChunks = Annotated[int, Option("--chunks", help="Length of a training rollout.")]
TrainTakes = Annotated[int, Option("--batch", help="Rollouts in lockstep.")]
TrainPolicy = Annotated[
    str, Option("--policy", "-p", help="The policy the compressor is to serve, as for `longtake generate`.")
]
PromptFile = Annotated[
    Path | None,
    Option("--prompts", metavar="FILE", help="What to see, one prompt a line.", show_default="those the model names"),
]
RealScore = Annotated[
    Path | None,
    Option(
        "--real-score", metavar="DIR",
        help="A many-step Wan model of the same VAE and text encoder: trains by distribution matching.",
    ),
]  # fmt: skip
FakeScore = Annotated[
    Path | None,
    Option("--fake-score", metavar="DIR", help="What learns the rollout's own videos.", show_default="--real-score"),
]
LoraRank = Annotated[int, Option("--lora-rank", help="Rank of an adapter that learns along; 0 leaves the model alone.")]
Rate = Annotated[float | None, Option(help="Learning rate.", show_default="0.002; 2e-6 with score models")]
Carry = Annotated[str, Option(help="How compressed tokens get their keys and values: blocks or projection.")]
CompressedPositions = Annotated[
    str, Option("--positions", help="Where compressed tokens stand: midpoint, raster or phasor.")
]
RolloutPast = Annotated[
    str, Option("--past", help="What rollouts remember: own (their own chunks) or films (of the procedural world).")
]
LowBranch = Annotated[str, Option("--low", help="What the low-resolution branch pools: pixels or latents.")]
