"""The page of a comparison in a real browser: what people see of it, and do to it. No browser is a failure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from longtake.evaluate import report
from tests.compared import EVIL, FPS, FRAMES, films, made, world
from tests.test_serve_page import AUDIT

WIDE = """() => [...document.querySelectorAll("body *")]
  .filter((e) => e.checkVisibility() && !e.closest(".wide, pre, .chips, #tip, svg"))
  .filter((e) => e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 90))"""
LIGHT = """(all) => all.map((video) => {
  const pen = new OffscreenCanvas(1, 1).getContext("2d");
  pen.drawImage(video, 0, 0, 1, 1);
  return pen.getImageData(0, 0, 1, 1).data[0];
})"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A page with free takes and a world; the videos of the second prompt are linked."""
    folder = tmp_path_factory.mktemp("compared")
    summary = {**made(folder), "tables": world()["tables"]}
    sizes = [(folder / "cells" / f"{key:016x}" / "take.mp4").stat().st_size for key in range(0, 8, 2)]
    (folder / "report.html").write_text(report.page(summary, folder, sum(sizes)))
    return folder / "report.html"


@contextmanager
def opened(browser: Browser, file: Path, **options: Any) -> Iterator[Page]:
    """The page, drawn. What it says on the console fails the test, and so does whatever it asks of elsewhere."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
    page = context.new_page()
    page.set_default_timeout(20_000)
    said: list[str] = []
    here = (file.as_uri(), "blob:", (file.parent / "cells").as_uri())
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(here) else said.append(request.url))
    try:
        page.goto(file.as_uri())
        page.locator("html[data-ready=yes]").wait_for(state="attached")
        yield page
        assert not said, said
    finally:
        context.close()


@pytest.fixture(scope="module")
def page(browser, file) -> Iterator[Page]:
    """One page for the tests that leave it as usable as they found it."""
    with opened(browser, file) as page:
        yield page


def times(page: Page) -> list[float]:
    found: list[float] = page.locator("video").evaluate_all("(all) => all.map((v) => (v.seeking ? -1 : v.currentTime))")
    return found


def until_at(page: Page, frame: int) -> None:
    """Wait until all videos stand in the middle of a frame."""
    middle = (frame + 0.5) / FPS
    for _ in range(400):
        if all(abs(at - middle) < 0.3 / FPS for at in times(page)):
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"the videos are at {times(page)}, not at {middle}")


def test_videos_follow_one_scrubber_play_in_step_and_end(page):
    scrub = page.get_by_label("Frame, of all videos")
    page.locator("video").nth(3).wait_for()
    assert page.locator("video").count() == 4
    until_at(page, 0)
    scrub.fill("13")
    until_at(page, 13)
    assert "frame 14 of 24 · chunk 4" in page.locator(".deck output").text_content()
    scrub.press("ArrowRight")
    until_at(page, 14)
    page.get_by_role("button", name="One frame back").click()
    until_at(page, 13)
    page.get_by_label("Speed", exact=True).last.select_option("2")
    page.get_by_role("button", name="Play").click()
    until_at(page, FRAMES - 1)
    page.get_by_role("button", name="Play").wait_for()  # it has come to its end
    lit = page.locator("video").evaluate_all(LIGHT)
    expected = [60 + 2 * (FRAMES - 1) + 10 * cell for cell in (0, 2, 4, 6)]
    assert all(abs(a - b) < 8 for a, b in zip(lit, expected, strict=True)), (lit, expected)


def test_linked_videos_play_while_the_folder_is_beside_the_page(page):
    prompt = page.locator("[data-view=player]").get_by_label("Prompt and seed")
    prompt.select_option(index=1)
    assert page.locator("video").first.get_attribute("src") == f"cells/{1:016x}/take.mp4"
    page.get_by_label("Frame, of all videos").fill("5")
    until_at(page, 5)
    prompt.select_option(index=0)
    until_at(page, 5)


def test_two_videos_lie_over_each_other_with_a_border_that_moves(page):
    view, over = page.locator("[data-view=player]"), page.get_by_label("Lay over each other")
    expect(over).to_be_disabled()
    others = ["full", "window:frames=6"]
    for arm in others:
        view.get_by_role("button", name=arm, exact=True).click()
    over.check()
    view.get_by_label("Where the two videos meet").fill("30")
    first, second = view.locator("figure").nth(0).bounding_box(), view.locator("figure").nth(1).bounding_box()
    assert (first["x"], first["y"]) == (second["x"], second["y"])
    assert "30%" in view.locator("video").nth(1).evaluate("(e) => getComputedStyle(e).clipPath")
    over.uncheck()
    for arm in others:
        view.get_by_role("button", name=arm, exact=True).click()
    expect(view.locator("video")).to_have_count(4)


def test_the_eviction_viewer_tells_a_chunk_and_obeys_keys(page):
    view = page.locator("[data-view=sight]")
    view.get_by_label("Arm").select_option("packforcing")
    told, slider = view.locator(".told"), view.get_by_label("Chunk that is being generated")
    slider.focus()
    slider.press("End")
    expect(told).to_contain_text("Chunk 6 makes frames 15 to 17. It sees 3 of 5 held blocks")
    expect(told).to_contain_text("96 tokens in full, 3 tokens compressed, beside 48 of its own")
    slider.press("ArrowLeft")
    expect(told).to_contain_text("Chunk 5 makes")
    until_at(page, 16)  # the videos go along
    slider.press("Home")
    assert told.text_content().startswith("Chunk 1 makes")
    view.locator("canvas").focus()
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    assert told.text_content().startswith("Chunk 4 makes")
    for _ in range(9):
        page.keyboard.press("ArrowLeft")
    assert "block of frames 0 to 2, committed" in view.get_by_role("status").last.text_content()
    assert slider.input_value() == "3"
    view.get_by_text("This chunk's blocks as a table").click()
    row = view.locator("tbody tr").nth(1).text_content()
    assert "frames 3 to 5" in row and "compressed, 6 tokens of 48, place 4.5 to 6.5, for 50 % of layers × heads" in row
    view.get_by_label("Arm").select_option("window:frames=6")
    expect(told).to_contain_text("Dropped since the chunk before: frames 0 to 2.")


def test_the_front_is_marked_and_told(page):
    speed = page.locator("[data-view=tradeoff]").first
    assert (
        "On the front: packforcing + flowcache:slow; window:frames=6; full."
        in speed.get_by_role("status").text_content()
    )
    assert speed.locator(".point.winner").count() == 3 and speed.locator(".point").count() == 4
    speed.get_by_label("Quality").select_option("psnr_db")
    text = speed.get_by_role("status").text_content()
    assert "On the front: packforcing + flowcache:slow." in text and "Not drawn, for want of a number: full;" in text
    speed.locator(".point").first.hover()
    assert "PSNR, dB: 31.5 (31.4 to 31.6)" in page.get_by_role("tooltip").text_content()
    page.mouse.move(0, 0)
    speed.get_by_label("Quality").select_option("brightness_drift")


def test_curves_change_with_their_choices_and_answer_keys(page):
    view = page.locator("[data-view=curves]")
    picture, cost = view.locator(".pair > div").nth(0), view.locator(".pair > div").nth(1)
    assert cost.locator("path.line").count() == 4
    view.get_by_role("button", name="full", exact=True).click()
    assert cost.locator("path.line").count() == 3 and cost.locator("path.band").count() == 3
    view.get_by_role("button", name="full", exact=True).click()
    cost.get_by_label("Cost by chunk").select_option("chunk_attended_tokens")
    cost.get_by_role("slider").focus()
    page.keyboard.press("ArrowRight")
    assert "chunk 2 · full: 96" in cost.get_by_role("status").text_content()
    picture.get_by_label("Picture over time").select_option("similarity")
    assert picture.get_by_label("Shown as").is_hidden() and picture.locator("path.line").count() == 4


def test_decisions_are_mapped_and_explained(page):
    view = page.locator("[data-view=decisions]")
    assert "33.3 % of 18 steps reused." in view.text_content() and view.locator("canvas").count() == 1
    view.locator("canvas").focus()
    page.keyboard.press("ArrowDown")
    told = view.get_by_role("status").text_content()
    assert "chunk 1, step 2" in told and "reused" in told and "change 0.1" in told and "it hardly moved" in told


def test_a_table_is_sorted_by_the_column_that_was_asked_for(page):
    table = page.locator("#takes-0-cost")
    first = table.locator("tbody tr th").first
    table.get_by_role("button", name="seconds a chunk").click()
    assert first.text_content() == "full"
    table.get_by_role("button", name="seconds a chunk").click()
    assert first.text_content() == "packforcing + flowcache:slow"


def test_prompts_stay_text(page):
    assert page.title() == "longtake compare"
    assert page.locator("main img, header img, main script").count() == 0
    assert EVIL in page.locator("#notes + ul li").last.text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_a_name_and_can_be_read(browser, file, scheme):
    with opened(browser, file, color_scheme=scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true })")
        assert [line for line in page.evaluate(AUDIT) if line != "no alert"] == []


def test_the_page_fits_a_phone_and_paper(browser, file):
    with opened(browser, file, viewport={"width": 375, "height": 740}, has_touch=True, is_mobile=True) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        assert page.evaluate(WIDE) == []
        page.get_by_label("Speed", exact=True).last.select_option("0.25")
        page.get_by_role("button", name="Play").tap()
        page.get_by_role("button", name="Pause").wait_for()
        page.emulate_media(media="print")
        assert page.locator(".deck button.main").is_hidden() and page.locator("#takes-0-quality").is_visible()


def test_videos_of_the_world_stand_side_by_side_the_truth_first(browser, tmp_path):
    (tmp_path / "report.html").write_text(report.page(world(films(tmp_path)), tmp_path))
    with opened(browser, tmp_path / "report.html") as page:
        part = page.locator("[data-view=player]")
        expect(part.locator("video")).to_have_count(4)
        expect(part.locator("figcaption").first).to_have_text("truth")
        part.get_by_role("button", name="One frame on").click()
        expect(part.locator("output.time")).to_contain_text(f"frame 2 of {FRAMES}")
        page.wait_for_function(
            "() => [...document.querySelectorAll('video')].every((v) => v.readyState >= 2 && !v.seeking)"
        )
        assert part.locator("video").evaluate_all(LIGHT) == pytest.approx([60, 100, 140, 180], abs=8)
