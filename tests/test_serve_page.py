"""The page in a real browser: what people see of a take, hear of it, and do to it. No browser is a failure."""

from __future__ import annotations

import colorsys
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import av
import pytest
from playwright.sync_api import Browser, Page

import longtake
from longtake.serve.strip import Sight
from tests.serving import serving, until

RED = "a red ball moving on a dark background"
BLUE = "a blue ball moving on a dark background"
TOKEN = "a-token-of-the-tests-0123456789"

# The pixels that the player shows now: mean of all, and mean of the coloured ones (empty if there are none).
PIXELS = """(id) => {
  const shown = document.getElementById(id), canvas = new OffscreenCanvas(64, 64), pen = canvas.getContext("2d");
  pen.drawImage(shown, 0, 0, 64, 64);
  const data = pen.getImageData(0, 0, 64, 64).data, picked = [0, 0, 0, 0];
  let all = 0;
  for (let i = 0; i < data.length; i += 4) {
    const [r, g, b] = data.slice(i, i + 3);
    all += r + g + b;
    if (Math.max(r, g, b) - Math.min(r, g, b) > 80) [r, g, b, 1].forEach((v, n) => picked[n] += v);
  }
  const colour = picked.slice(0, 3).map((v) => v / (picked[3] || 1));
  return { mean: all / (3 * 64 * 64), coloured: picked[3], colour };
}"""

# What a screen reader would not know what to call, and what eyes could not find or reach.
AUDIT = """() => {
  const shown = (e) => e.checkVisibility({ visibilityProperty: true }), wrong = [];
  const text = (e) => (e?.textContent ?? "").trim();
  const called = (ids) => (ids ?? "").split(" ").map((id) => text(document.getElementById(id))).join(" ").trim();
  const name = (e) => e.getAttribute("aria-label")?.trim() || called(e.getAttribute("aria-labelledby"))
    || [...(e.labels ?? [])].map(text).join(" ").trim()
    || (e.matches("button, a, summary, h1, h2, h3, h4") ? text(e) : "");
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  for (const id of ids) if (ids.filter((other) => other === id).length > 1) wrong.push(`two elements are #${id}`);
  for (const e of document.querySelectorAll("button, input, select, textarea, a, video, canvas, summary, [role=img]")) {
    if (!shown(e)) continue;
    if (!name(e)) wrong.push(`no name: ${e.outerHTML.slice(0, 80)}`);
    if (e.tabIndex > 0) wrong.push(`tab order: ${e.id}`);
    const box = e.getBoundingClientRect();
    if (e.matches("button, select, textarea, summary") && box.height < 40) wrong.push(`${e.id || text(e)}: too low`);
  }
  for (const e of document.querySelectorAll("section, form, [role=group], [role=region]")) {
    if (shown(e) && !name(e) && !e.closest("section[aria-labelledby]")) wrong.push(`no name: ${e.id}`);
  }
  for (const attribute of ["aria-labelledby", "aria-describedby", "for"]) {
    for (const e of document.querySelectorAll(`[${attribute}]`)) {
      for (const id of e.getAttribute(attribute).split(" ")) {
        if (!document.getElementById(id)) wrong.push(`${attribute}=${id} names nothing`);
      }
    }
  }
  let level = 0;
  for (const e of document.querySelectorAll("h1, h2, h3, h4")) {
    if (!shown(e)) continue;
    if (+e.tagName[1] > level + 1) wrong.push(`heading skips a level: ${text(e)}`);
    level = +e.tagName[1];
  }
  if (!document.documentElement.lang) wrong.push("no language");
  for (const role of ["alert", "status"]) if (!document.querySelector(`[role=${role}]`)) wrong.push(`no ${role}`);
  for (const e of document.querySelectorAll("p, label, button, h1, h2, h3, li, figcaption, dd, dt, td, th, summary")) {
    if (!shown(e) || !text(e) || e.disabled) continue;
    let behind = e;
    while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const light = (c) => c.match(/[\\d.]+/g).slice(0, 3).map((v) => linear(v / 255))
      .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const a = light(getComputedStyle(e).color), b = light(getComputedStyle(behind ?? document.body).backgroundColor);
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) wrong.push(`contrast ${contrast.toFixed(1)}: ${text(e).slice(0, 40)}`);
  }
  return wrong;
}"""


class Wire:
    """A TCP proxy on loopback that can be cut: the network between the page and the server."""

    def __init__(self, port: int) -> None:
        self._to, self._open, self._ends = port, True, set[socket.socket]()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._open = False
        for end in list(self._ends):
            _hang_up(end)

    def mend(self) -> None:
        self._open = True

    def close(self) -> None:
        self.cut()
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._socket.accept()
                if not self._open:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._to))
                self._ends |= {near, far}
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            _hang_up(end)
            self._ends.discard(end)


def _hang_up(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


@contextmanager
def opened(browser: Browser, url: str, quiet: bool = True, **options: Any) -> Iterator[Page]:
    """The page in a profile of its own. What it said on the console, or asked of other places, fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, **options)
    page = context.new_page()
    page.set_default_timeout(15_000)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(f"asked {request.url}") if not ours(request.url, url) else None)
    page.goto(url)
    try:
        yield page
        assert not quiet or not said, said
        assert not [line for line in said if line.startswith("asked")], said
    finally:
        context.close()


def ours(asked: str, url: str) -> bool:
    return asked.startswith((url, f"blob:{url}", url.replace("http", "ws", 1)))


def begin(page: Page, prompt: str) -> str:
    """Type a prompt and press Begin; the take's id."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Seed", exact=False).evaluate("(e) => { e.value = 7 }")
    page.get_by_role("button", name="Begin").click()
    page.get_by_role("heading", name="The take", exact=True).wait_for()
    return page.evaluate("location.hash").removeprefix("#take=")


def pixels(page: Page, element: str = "video") -> dict[str, Any]:
    found: dict[str, Any] = page.evaluate(PIXELS, element)
    return found


def hue(page: Page, element: str = "video") -> float | None:
    """Hue of what is coloured in the picture, in degrees; None where hardly anything is."""
    found = pixels(page, element)
    red, green, blue = (value / 255 for value in found["colour"])
    return 360 * colorsys.rgb_to_hsv(red, green, blue)[0] if found["coloured"] >= 12 else None


def is_red(page: Page, element: str = "video") -> bool:
    seen = hue(page, element)
    return seen is not None and (seen < 30 or seen > 330)


def is_blue(page: Page, element: str = "video") -> bool:
    seen = hue(page, element)
    return seen is not None and 190 < seen < 265


def frames(page: Page) -> int:
    count: int = page.evaluate("document.getElementById('video').getVideoPlaybackQuality().totalVideoFrames")
    return count


def test_the_first_frame_is_seen_soon_and_the_figures_move(browser, client, record_property):
    with opened(browser, client.url) as page:
        page.get_by_role("button", name="Begin").wait_for()
        began = time.monotonic()
        begin(page, RED)
        until(lambda: pixels(page)["mean"] > 3, 10)
        record_property("first_frame_seconds", round(time.monotonic() - began, 2))
        until(lambda: is_red(page))
        first = frames(page)
        until(lambda: frames(page) > first + 16)
        for name in ("speed", "realtime", "held", "tokens"):
            assert page.locator(f"#meter-{name}").text_content()[0].isdigit(), name
        assert page.locator("#link").text_content() == "Watching"
        assert page.locator("#moments li").count() == 1


def test_a_prompt_change_is_visible_in_the_picture_and_stands_in_the_timeline(browser, client):
    with opened(browser, client.url) as page:
        name = begin(page, RED)
        until(lambda: is_red(page))
        page.get_by_label("What becomes of the past").select_option("recache")
        prompt = page.get_by_label("Prompt from the next chunk on")
        prompt.fill(BLUE)
        prompt.press("Control+Enter")
        page.get_by_text("The new prompt is in force").wait_for(state="attached")
        until(lambda: is_blue(page))
        moments = page.locator("#moments li").all_text_contents()
        assert len(moments) == 2 and RED in moments[0] and BLUE in moments[1]
        assert page.get_by_label(f"Live video: {BLUE}").is_visible()
        assert client.session(name)["prompt"] == BLUE


def test_who_comes_late_finds_the_prompts_and_policies_so_far(browser, client):
    name = client.create(RED, seed=7)["id"]
    until(lambda: client.session(name)["chunk"] >= 1)
    client.steer(name, type="prompt", text=BLUE, mode="cut")
    made = client.session(name)["chunk"]
    until(lambda: client.session(name)["chunk"] > made)
    client.steer(name, type="policy", policy="window:frames=9,sink=3")
    with opened(browser, client.url) as page:
        page.goto(f"{client.url}/#take={name}")
        page.reload()
        until(lambda: page.locator("#moments li").count() == 3)
        first, second, third = page.locator("#moments li").all_text_contents()
        assert RED in first and BLUE in second and "cut" in second and "window:frames=9" in third
        until(lambda: pixels(page)["mean"] > 3)
        assert page.locator("#moments li").count() == 3  # what is made now changes none of it


def test_the_picture_goes_on_after_the_network_was_away(browser, server, client):
    wire = Wire(server[1].address[1])
    try:
        with opened(browser, wire.url, quiet=False) as page:  # a browser notes lost connections on its console
            name = begin(page, RED)
            until(lambda: frames(page) > 8)
            until(lambda: client.session(name)["viewers"] == 1)
            wire.cut()
            page.get_by_text("Connection lost, trying again").wait_for()
            at, missed = frames(page), client.session(name)["frames"]
            until(lambda: client.session(name)["frames"] > missed + 24)  # the take did not wait
            page.get_by_text("Connection lost, trying again").wait_for()
            wire.mend()
            page.get_by_text("Watching", exact=True).wait_for()
            until(lambda: frames(page) > at + 40)
            assert page.evaluate("document.getElementById('video').currentTime") * 16 > missed
            until(lambda: is_red(page))
    finally:
        wire.close()


def test_a_prompt_is_text_wherever_it_is_shown(browser, client):
    prompt = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script><b>bold</b>"
    with opened(browser, client.url) as page:
        begin(page, prompt)
        until(lambda: pixels(page)["mean"] > 3)
        page.get_by_role("button", name="Save a snapshot").click()
        page.locator("#snapshots li").wait_for()
        page.reload()  # the list of takes, and the welcome of a take that runs
        page.locator("#takes-list li").wait_for()
        until(lambda: page.locator("#moments li").count() == 1)
        for place in ("#moments li", "#state", "#takes-list li", "#snapshots li", "#track"):
            until(lambda place=place: prompt in page.locator(place).first.text_content())
        assert page.title() == "longtake live"
        assert page.evaluate("document.querySelectorAll('main img, main b, main script').length") == 0


def test_pause_record_and_download(browser, client, tmp_path):
    with opened(browser, client.url) as page:
        name = begin(page, RED)
        page.get_by_role("button", name="Record").click()
        until(lambda: client.session(name)["recorded_frames"] > 20)
        page.get_by_role("button", name="Pause").click()
        page.get_by_role("button", name="Resume").wait_for()
        assert client.session(name)["state"] == "paused"
        with page.expect_download() as waiting:
            page.get_by_role("button", name="Download").click()
        waiting.value.save_as(tmp_path / "take.mp4")
        with av.open(str(tmp_path / "take.mp4")) as container:
            assert len(list(container.decode(video=0))) == client.session(name)["recorded_frames"]
        page.get_by_role("button", name="Resume").click()
        page.get_by_role("button", name="Pause").wait_for()


def test_at_its_end_a_take_offers_no_change_and_its_fork_does(browser, client):
    name = client.create(RED, seed=7, pace="free", chunks=1)["id"]
    until(lambda: client.session(name)["state"] == "ended")
    with opened(browser, client.url) as page:
        page.goto(f"{client.url}/#take={name}")
        page.reload()
        page.get_by_text("All chunks of this take are made").wait_for()
        names = ("Change the prompt", "Change the policy", "Record")
        ways = [page.get_by_role("button", name=words) for words in names]
        ways += [page.get_by_label("Prompt from the next chunk on"), page.get_by_label("KV policy").first]
        assert all(way.is_disabled() for way in ways)
        page.get_by_role("button", name="Fork", exact=True).click()
        until(lambda: page.evaluate("location.hash") != f"#take={name}")
        child = page.evaluate("location.hash").removeprefix("#take=")
        assert client.session(child)["chunks"] == 2
        until(lambda: client.session(child)["state"] == "ended")
        page.get_by_text("chunk 2 of 2").wait_for()
        assert page.evaluate(AUDIT) == []


def test_another_policy_is_taken_and_a_wrong_one_is_explained(browser, client):
    with opened(browser, client.url, quiet=False) as page:  # a browser notes a refused request on its console
        name = begin(page, RED)
        until(lambda: client.session(name)["chunk"] >= 2)
        form = page.get_by_role("form", name="Change the memory")
        assert form.get_by_label("KV policy").input_value() == client.session(name)["policy"].partition(":")[0]
        form.get_by_label("KV policy").select_option("window")
        form.get_by_label("Its options").fill("frames=9,sink=3")
        form.get_by_role("button").click()
        page.get_by_text("The policy is window").wait_for(state="attached")
        assert client.session(name)["policy"].startswith("window:frames=9")
        until(lambda: "window:frames=9" in page.locator("#moments").text_content())
        form.get_by_label("Its options").fill("frames=many")
        form.get_by_role("button").click()
        alert = page.get_by_role("alert")
        alert.wait_for()
        assert "frames" in alert.text_content()


def test_pictures_where_a_browser_cannot_play_the_video(browser, client):
    with opened(browser, client.url) as page:
        page.evaluate("document.getElementById('player').value = 'jpeg'")
        begin(page, RED)
        until(lambda: is_red(page, "pictures"))
        assert page.get_by_role("img", name=f"Live pictures: {RED}").is_visible()
        assert page.locator("#video").is_hidden()


def test_a_token_is_asked_for_kept_in_the_tab_and_never_in_an_address(browser, host, tmp_path):
    with serving(host, tmp_path / "state", tokens={"ann": TOKEN}) as (client, _):
        asked: list[str] = []
        with opened(browser, client.url, quiet=False) as page:
            page.on("request", lambda request: asked.append(request.url))
            page.on("websocket", lambda socket: asked.append(socket.url))
            field = page.get_by_label("API token")
            field.wait_for()
            assert field.evaluate("(e) => e === document.activeElement")
            field.fill("a-wrong-token-0123456789")
            field.press("Enter")
            page.get_by_text("does not know this token").wait_for()
            field.fill(TOKEN)
            field.press("Enter")
            begin(page, RED)
            until(lambda: pixels(page)["mean"] > 3)
            page.get_by_role("button", name="Record").click()
            until(lambda: client.sessions()[0]["recorded_frames"] > 9)
            with page.expect_download() as waiting:
                page.get_by_role("button", name="Download").click()
            assert Path(waiting.value.path()).read_bytes()[4:8] == b"ftyp"
            assert any(url.startswith("ws") for url in asked) and not [url for url in asked if TOKEN in url]
            assert TOKEN not in page.evaluate("JSON.stringify([localStorage, document.cookie, location.href])")
            page.reload()
            page.get_by_text("Watching", exact=True).wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_a_name_and_can_be_read(browser, client, scheme):
    with opened(browser, client.url, color_scheme=scheme) as page:
        page.get_by_role("button", name="Begin").wait_for()
        assert page.evaluate(AUDIT) == []
        begin(page, RED)
        until(lambda: frames(page) > 8)
        page.get_by_role("button", name="Save a snapshot").click()
        page.locator("#snapshots li").wait_for()
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true })")
        assert page.evaluate(AUDIT) == []


def test_the_keyboard_reaches_every_control_and_works_a_take(browser, client):
    with opened(browser, client.url) as page:
        page.get_by_label("Prompt", exact=True).focus()
        page.keyboard.type(RED)
        page.keyboard.press("Control+Enter")
        page.get_by_role("heading", name="The take", exact=True).wait_for()
        until(lambda: page.evaluate("document.activeElement.id") == "steer-prompt")
        page.locator("body").evaluate("(e) => { e.tabIndex = -1; e.focus() }")
        reached = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id"))
        wanted = {"position", "live", "pause", "record", "save", "fork", "full", "delete", "steer-prompt", "steer-mode",
                  "policy-name", "policy-options", "read", "new-prompt", "new-model", "new-policy"}  # fmt: skip
        assert wanted <= reached
        page.locator("#pause").focus()
        page.keyboard.press("Space")
        page.get_by_role("button", name="Resume").wait_for()
        page.get_by_text("The take is paused.").wait_for(state="attached")


def test_the_page_fits_a_phone(browser, client):
    with opened(browser, client.url, has_touch=True, is_mobile=True, device_scale_factor=2) as page:
        page.set_viewport_size({"width": 360, "height": 740})
        begin(page, RED)
        until(lambda: frames(page) > 8)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.locator("#video").bounding_box()["width"] > 300
        page.get_by_role("button", name="Pause").tap()
        page.get_by_role("button", name="Resume").wait_for()


def test_who_asks_for_less_motion_starts_the_video_himself(browser, client):
    with opened(browser, client.url, reduced_motion="reduce") as page:
        begin(page, RED)
        page.get_by_role("button", name="Play the video").wait_for()
        until(lambda: page.locator("#moments li").count() == 1)
        assert page.evaluate("document.getElementById('video').paused")
        page.get_by_role("button", name="Play the video").click()
        until(lambda: pixels(page)["mean"] > 3)


def test_the_page_brings_a_policy_that_lets_no_foreign_script_in(client):
    with urlopen(client.url) as answer:
        policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    assert "require-trusted-types-for 'script'" in policy


def test_the_strip_tells_what_was_seen_from_what_is_only_held(host):
    take = longtake.Session(host, longtake.PackForcing(sink=1, recent=1, top_k=1, layers="shared"), prompt=RED, seed=1)
    sight = Sight(take)
    for _ in range(8):
        chunk = next(take)
    row, own = sight.row()[:-1], sight.row()[-1]
    assert own.frame == chunk.stats.frame and own.seen_full == own.tokens
    assert sum(b.seen_full for b in row) + own.tokens + row[1].compressed == chunk.stats.attended_tokens
    assert any(b.seen_compressed == b.compressed > 0 == b.seen_full for b in row)
    assert row[0].frame == 0 and row[0].seen_full == row[0].full > 0
    assert any(b.seen_full == b.seen_compressed == 0 for b in row), "some candidates were not chosen"
