"""Ten thousand messages that no client would send, through both doors of a server: none ends it, none is answered with
an error that the interface does not name, and nobody gets to see another's session.

The same messages every time (`derandomize`), so that a failure can be repeated.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import response_schema_conformance
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import longtake
from longtake.serve.client import Client, Stream
from longtake.serve.fmp4 import boxes
from tests.serving import PROMPT, collect, serving, until

TOKENS = {"ada": "a" * 32, "bob": "b" * 32}
SECRET = "a prompt that only ada knows"
AUTH = {"authorization": f"Bearer {TOKENS['bob']}"}

REST, HELLOS, MESSAGES = 1_000, 200, 8_800
PER_EXAMPLE = 25

_sent: dict[str, int] = {}


def fuzz(examples: int) -> Any:
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> Iterator[Any]:
    """A server, what is ada's on it, and bob's client; ada's is checked at the end."""
    host, state = longtake.load("tiny-shapes", device="cpu"), tmp_path_factory.mktemp("fuzz") / "state"
    limits = {"max_pixels": 128 * 128, "sessions_per_token": 4, "saved_per_session": 2, "idle_seconds": 1e6}
    with errors() as found, serving(host, state, TOKENS, **limits) as (ada, server):
        name = ada.create(SECRET, seed=1, pace="free", chunks=2, paused=True)["id"]
        with ada.watch(name) as stream:
            ada.steer(name, type="resume")
            _, parts = collect(stream, 9 + 12)
        until(lambda: ada.session(name)["state"] == "ended" and not ada.session(name)["viewers"])
        saved = ada.steer(name, type="save")["snapshot"]["id"]
        before = ada.session(name)
        hidden = Hidden(name, saved, {_picture(part) for part in parts[1:]})
        yield Client(ada.url, TOKENS["bob"]), hidden
        assert server.service.healthy and ada.session(name) == before
        assert not found, found


class Hidden:
    """What is ada's: the names of it may be said to the server, what is in it may not come back."""

    def __init__(self, name: str, saved: str, pictures: set[bytes]) -> None:
        self.name, self.saved, self.pictures = name, saved, pictures

    def check(self, item: str | bytes) -> None:
        if isinstance(item, str):
            assert SECRET not in item
        else:
            assert SECRET.encode() not in item and not any(picture in item for picture in self.pictures)


def _picture(fragment: bytes) -> bytes:
    start, end = next((a, b) for kind, a, b in boxes(fragment) if kind == "mdat")
    return fragment[start:end]


@contextmanager
def errors() -> Iterator[list[str]]:
    """What any part of the server logs as an error."""
    found: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(f"{record.name}: {record.getMessage()} {record.exc_info}")

    listener, log = Listener(logging.ERROR), logging.getLogger()
    log.addHandler(listener)
    try:
        yield found
    finally:
        log.removeHandler(listener)


# --- requests -------------------------------------------------------------------------------------------------------


def test_requests_made_from_the_interface_s_own_description_are_answered_as_it_says(fuzzed):
    bob, hidden = fuzzed
    schema = schemathesis.openapi.from_url(f"{bob.url}/v1/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 12
    sent = wrong = 0

    def run(operation: Any, name: str | None, mode: GenerationMode, count: int) -> None:
        documented = {int(status) for status in operation.definition.raw["responses"]}
        fixed = {} if name is None else {"path_parameters": {"name": name}}
        with requests.Session() as session:

            @fuzz(count)
            @given(case=operation.as_strategy(generation_mode=mode, **fixed))
            def one(case: Any) -> None:
                nonlocal sent, wrong
                answer = case.call(session=session, headers=AUTH, timeout=60)
                sent += 1
                wrong += mode is GenerationMode.NEGATIVE
                hidden.check(answer.content)
                # what the framework itself refuses: addresses and bodies that are none
                assert answer.status_code in documented | {400, 404, 405}, (answer.status_code, answer.content)
                assert name != hidden.name or answer.status_code in (400, 401, 404, 405, 422), answer.content
                if answer.status_code in documented:
                    case.validate_response(answer, checks=[response_schema_conformance])

            try:
                one()
            except Unsatisfiable:  # an operation of which nothing can be got wrong but what is given here
                assert mode is GenerationMode.NEGATIVE

    shares = {"/v1/sessions": 3, "/v1/sessions/{name}/steer": 3, "/v1/sessions/{name}/fork": 2}
    per_share = 24
    for operation in operations:
        own = bob.create(PROMPT, paused=True, chunks=1)["id"]
        share = per_share * (shares.get(operation.path, 1) if operation.method == "post" else 1)
        names: list[str | None] = [None, hidden.name, own] if "{name}" in operation.path else [None]
        if operation.path.endswith("/mjpeg"):
            names.remove(own)  # it would be streamed for ever
        for name in names:
            run(operation, name, GenerationMode.POSITIVE, share)
            if "requestBody" in operation.definition.raw or (name is None and len(names) > 1):
                run(operation, name, GenerationMode.NEGATIVE, share)  # there is something to get wrong
        for session in bob.sessions():
            bob.delete(session["id"])
    _sent["requests"] = sent
    assert sent >= REST and wrong >= REST // 5, (sent, wrong)


# --- the socket -----------------------------------------------------------------------------------------------------

texts = st.text(max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=5,
)  # fmt: skip
pieces = st.sampled_from(['"', *"{}[]:,'", "null", "1e999", "-1", "\\u0000", "\0", "true", "../", "\N{GRINNING FACE}"])


def actions(ids: list[str]) -> Any:
    """Actions as they should be, and with fields of the wrong kind, too many and too few."""
    policies = ["window:frames=9", "full", "packforcing", "window:frames=1e9", "/etc/passwd:Policy", "no", ""]
    fields = {
        "text": texts | st.just("x" * 2001), "mode": st.sampled_from(["keep", "recache", "flush", "cut", "burn"]),
        "policy": st.sampled_from(policies), "snapshot": st.sampled_from([*ids, "../../etc", "A" * 22]) | texts,
        "on": st.booleans(),
    }  # fmt: skip
    kinds = {"prompt": ["text", "mode"], "policy": ["policy"], "seek": ["snapshot"], "record": ["on"], "save": [],
             "pause": [], "resume": [], "delete": [], "hello": []}  # fmt: skip
    right = st.one_of(
        *(st.fixed_dictionaries({"type": st.just(kind)} | {f: fields[f] for f in own}) for kind, own in kinds.items())
    )
    wrong = st.fixed_dictionaries(
        {"type": st.sampled_from([*kinds, None, 1])}, optional={field: values for field in (*fields, "extra")}
    )
    return wrong | wrong | wrong | right  # what is right takes time: a policy that changes, a chunk that is made


def messages(ids: list[str]) -> Any:
    ask = st.fixed_dictionaries({"type": st.just("steer"), "action": actions(ids)}, optional={"id": st.integers()})
    lines = (ask | values).map(json.dumps)
    broken = st.builds(
        lambda line, at, length, piece: line[: at % (len(line) + 1)] + piece + line[at % (len(line) + 1) + length :],
        lines, st.integers(0, 500), st.integers(0, 9), pieces,
    )  # fmt: skip
    return lines | lines | broken | broken | st.text(max_size=40) | st.binary(max_size=40)


def test_messages_of_a_viewer_are_each_answered_whatever_they_are(fuzzed):
    bob, hidden = fuzzed
    name = bob.create(PROMPT, seed=2, pace="free", chunks=1, paused=True)["id"]
    saved = bob.steer(name, type="save")["snapshot"]["id"]
    sent = answered = done = 0
    stream: Stream | None = None

    def answers(stream: Stream, count: int) -> None:
        nonlocal answered, done
        while count:
            item = stream.socket.recv(timeout=120)
            hidden.check(item)
            if isinstance(item, bytes):
                continue
            told = json.loads(item)
            assert told["type"] in ("done", "error", "changed", "chunk"), told
            assert told["type"] != "changed" or told["session"]["id"] == name
            if told["type"] in ("done", "error"):
                answered, done, count = answered + 1, done + (told["type"] == "done"), count - 1

    @fuzz(MESSAGES // PER_EXAMPLE)
    @given(batch=st.lists(messages([hidden.saved, hidden.name, saved]), min_size=PER_EXAMPLE, max_size=PER_EXAMPLE))
    def run(batch: list[str | bytes]) -> None:
        nonlocal sent, stream
        if stream is None or sent % (20 * PER_EXAMPLE) == 0:  # another viewer now and then
            if stream is not None:
                stream.__exit__(None, None, None)
            stream = bob.watch(name).__enter__()
        for message in batch:
            stream.socket.send(message if isinstance(message, bytes) else message.encode("utf-8", "replace").decode())
        sent += len(batch)
        answers(stream, len(batch))

    run()
    assert stream is not None
    stream.__exit__(None, None, None)
    _sent["messages"] = sent
    assert sent == answered >= MESSAGES and sent / 100 < done < sent / 2, (sent, answered, done)
    until(lambda: bob.session(name)["viewers"] == 0)
    bob.delete(name)


def test_first_messages_let_nobody_in_who_may_not(fuzzed):
    """Ada's session is asked for, with bob's token or none."""
    bob, hidden = fuzzed
    sent = 0
    hello = st.fixed_dictionaries(
        {"type": st.sampled_from(["hello", "steer"]), "version": st.sampled_from([1, 1, 2, -1, None, "1"])},
        optional={
            "token": st.sampled_from([TOKENS["bob"], "b", "a" * 31, None]) | texts,
            "format": st.sampled_from(["mp4", "jpeg", "avi"]), "extra": values,
        },
    ).map(json.dumps)  # fmt: skip

    @fuzz(HELLOS)
    @given(first=hello | hello | messages([hidden.saved]))
    def run(first: str | bytes) -> None:
        nonlocal sent
        with connect(f"{bob.url.replace('http', 'ws')}/v1/sessions/{hidden.name}/watch") as socket:
            socket.send(first if isinstance(first, bytes) else first.encode("utf-8", "replace").decode())
            sent += 1
            told = json.loads(socket.recv(timeout=60))
            assert told["type"] == "error", told
            with pytest.raises(ConnectionClosed):
                socket.recv(timeout=60)

    run()
    _sent["hellos"] = sent
    assert sent >= HELLOS


def test_there_were_ten_thousand(fuzzed):
    assert sum(_sent.values()) >= 10_000, _sent
