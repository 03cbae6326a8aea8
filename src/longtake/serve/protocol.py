"""What clients and server say to each other. Every message is typed; unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from .strip import StripBlock

VERSION = 1  # of this protocol: part of every path, and of the first message of a WebSocket
MAX_PROMPT = 2000  # characters
MAX_IMAGE = 12_000_000  # characters of base64
MAX_CHUNKS = 1_000_000  # of a take with an end

Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]
Spec = Annotated[str, Field(min_length=1, max_length=400, description="NAME[:key=value,…]; never a file")]
Identity = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{22}$")]
Mode = Literal["keep", "recache", "flush", "cut"]
State = Literal["running", "paused", "ended", "parked", "failed"]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# --- from the client ------------------------------------------------------------------------------------------------


class NewSession(Message):
    """A take to be made."""

    model: Annotated[str, Field(max_length=100)] | None = Field(None, description="one of GET /v1/models")
    policy: Spec | None = None
    reuse: Spec | None = None
    prompt: Prompt
    negative_prompt: Prompt | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    width: Annotated[int, Field(ge=1, le=8192)] | None = None
    height: Annotated[int, Field(ge=1, le=8192)] | None = None
    image: Annotated[str, Field(max_length=MAX_IMAGE)] | None = Field(None, description="first frame, base64")
    num_inference_steps: Annotated[int, Field(ge=1, le=200)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    chunks: Annotated[int, Field(ge=1, le=MAX_CHUNKS)] | None = Field(None, description="the take ends after so many")
    pace: Literal["live", "free"] = Field("live", description="live: about as fast as it plays; free: at once")
    paused: bool = Field(False, description="begin with the first `resume`")
    record: bool = False
    batch: bool = Field(
        False,
        description="make its chunks together with those of others of its size that ask for it too: fewer, larger "
        "forwards, rounded differently (1e-5)",
    )  # fmt: skip


class SetPrompt(Message):
    """Another prompt from the next chunk on. `mode` is what becomes of the past: stay as it is (keep), be rewritten
    under the new prompt (recache), be forgotten but for its ends (flush), and stand far off (cut); default: the
    policy's own way."""

    type: Literal["prompt"] = "prompt"
    text: Prompt
    mode: Mode | None = None


class Pause(Message):
    type: Literal["pause"] = "pause"


class Resume(Message):
    type: Literal["resume"] = "resume"


class SetPolicy(Message):
    """Another KV policy from the next chunk on; the history is made anew from the logged latents of the whole take."""

    type: Literal["policy"] = "policy"
    policy: Spec


class Seek(Message):
    """Go on from a saved snapshot; what came after it is forgotten."""

    type: Literal["seek"] = "seek"
    snapshot: Identity


class Record(Message):
    """Write what is streamed to an MP4 from its next key frame on, or stop writing."""

    type: Literal["record"] = "record"
    on: bool


class Save(Message):
    """Keep a snapshot of the take as it stands."""

    type: Literal["save"] = "save"


Action = Annotated[SetPrompt | Pause | Resume | SetPolicy | Seek | Record | Save, Field(discriminator="type")]


class Steer(Message):
    action: Action


class Fork(Message):
    """A new session that begins where a snapshot, or the take itself, stands, its end included."""

    snapshot: Identity | None = None
    prompt: Prompt | None = None
    chunks: Annotated[int, Field(ge=1, le=MAX_CHUNKS)] | None = Field(
        None,
        description="the new take ends after so many more; by default after as many as the original was to have when "
        "it was created or forked, without an end if that has none",
    )  # fmt: skip
    paused: bool = False


class Hello(Message):
    """The first message of a viewer."""

    type: Literal["hello"] = "hello"
    version: int
    token: Annotated[str, Field(max_length=500)] | None = None
    format: Literal["mp4", "jpeg"] = "mp4"


class Ask(Message):
    """An action sent over the WebSocket; answered by `done` or `error` with the same id."""

    type: Literal["steer"] = "steer"
    id: Annotated[int, Field(ge=0, lt=2**53)] = 0
    action: Action


HELLO: TypeAdapter[Hello] = TypeAdapter(Hello)
ASK: TypeAdapter[Ask] = TypeAdapter(Ask)


# --- from the server ------------------------------------------------------------------------------------------------


class ModelInfo(Message):
    name: str
    width: int
    height: int
    fps: float
    chunk_frames: int  # latent frames
    chunk_seconds: float  # of video
    prompts: list[str]
    about: str
    policy: str  # the default
    modes: list[str]  # of switching prompts


class PolicyInfo(Message):
    name: str
    about: str
    options: dict[str, str]


class SavedSnapshot(Message):
    id: str
    chunk: int  # chunks made before it
    prompt: str
    bytes: int
    created: float  # seconds since 1970
    frame: int | None = None  # where the stream stood


class Moment(Message):
    """From a frame of the stream on, another prompt or policy is in force, or the take goes on from a snapshot."""

    frame: int
    chunk: int  # chunks made before it
    what: Literal["begin", "prompt", "policy", "seek"]
    prompt: str
    policy: str
    mode: str | None = None  # of a prompt


class Recovery(Message):
    """How a session came back: from the snapshot after `snapshot_chunk` chunks, and what the log says came after it:
    `replayed_chunks` by their commit passes alone, or `remade_chunks` by denoising them again. `exact`: all of them
    came out as they are in the log, bit for bit."""

    snapshot_chunk: int
    replayed_chunks: int
    remade_chunks: int = 0
    exact: bool = True
    seconds: float


class SessionInfo(Message):
    id: str
    model: str
    state: State
    prompt: str
    policy: str
    reuse: str
    seed: int
    width: int
    height: int
    fps: float
    pace: str
    batch: bool
    chunk: int  # chunks made
    chunks: int | None  # when it ends
    frames: int  # pixel frames streamed
    viewers: int
    reserved_bytes: int  # by the arithmetic of admission
    held_bytes: int  # as measured; 0 when parked
    memory: dict[str, int]
    stats: dict[str, Any]  # of the last chunk
    recording: bool
    recorded_frames: int
    snapshots: list[SavedSnapshot]
    recovery: Recovery | None = None
    error: str | None = None
    created: float


class Fits(Message):
    """What would be accepted now."""

    policy: str
    bytes: int


class Problem(Message):
    """Why not: `code` for programs, `message` for people."""

    code: str
    message: str
    needed_bytes: int | None = None
    free_bytes: int | None = None
    fits: Fits | None = None


class ErrorAnswer(Message):
    error: Problem


class Welcome(Message):
    type: Literal["welcome"] = "welcome"
    version: int = VERSION
    session: SessionInfo
    format: str
    mime: str  # what a player is told: video/mp4 with its codec, or image/jpeg
    timeline: list[Moment] = []  # what became of the take so far, newest last


class ChunkMade(Message):
    """A chunk whose frames follow; `strip` is what the history holds after it and what of that it saw, per block:
    [first frame, span, tokens, held in full, held compressed, seen in full, seen compressed]."""

    type: Literal["chunk"] = "chunk"
    index: int
    frame: int  # first of its frames in the stream
    frames: int
    prompt: str
    policy: str
    stats: dict[str, Any]
    strip: list[StripBlock]


class Changed(Message):
    type: Literal["changed"] = "changed"
    session: SessionInfo
    timeline: list[Moment] | None = None  # if that has changed too


class Dropped(Message):
    """This viewer was too slow: so many fragments are missing; what follows begins with a key frame."""

    type: Literal["dropped"] = "dropped"
    fragments: int
    frame: int


class Done(Message):
    type: Literal["done"] = "done"
    id: int
    result: dict[str, Any]


class Failure(Message):
    type: Literal["error"] = "error"
    id: int | None = None
    error: Problem


class Bye(Message):
    type: Literal["bye"] = "bye"
    reason: str
