"""The page in a real browser: what a person does with it, with no error in the console and no request to elsewhere."""

import io
import shutil
import time
from urllib.parse import urlparse

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio: extra studio")
playwright = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright: extra dev")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")

from diffit.sampling import load  # noqa: E402
from diffit.studio.common import grid_picture  # noqa: E402
from studio.folders import write_stats  # noqa: E402

FIRST, NETWORK = (f"{kimg} kimg · 00000-a-debug-gpus1-batch8" for kimg in (1, 2))
SECONDS = 60  # that anything may take on a busy machine


@pytest.fixture(scope="module")
def page(served):
    """The page, and what went wrong in it or went elsewhere."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(SECONDS * 1000)
        page.wrong = []
        page.on("console", lambda line: page.wrong.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("request", lambda request: page.wrong.append(request.url) if is_elsewhere(request.url) else None)
        page.goto(served)
        page.get_by_role("tab", name="Sample").wait_for()
        yield page
        browser.close()


def is_elsewhere(url: str) -> bool:
    parts = urlparse(url)
    return parts.scheme not in ("data", "blob", "about") and parts.hostname != "127.0.0.1"


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def choose(page, place: str, value: str, which: int = 0) -> None:
    field = page.locator(f"{place}:visible input").nth(which)
    field.fill(value)
    field.press("Enter")


def text_of(page, place: str, words: str) -> str:
    page.wait_for_function(
        "([place, words]) => document.querySelector(place)?.innerText.includes(words)", arg=[place, words]
    )
    return page.locator(place).inner_text()


def picture_of(page, place: str) -> Image.Image:
    source = page.locator(f"{place} img").first.get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")


def fill(page, label: str, value: object) -> None:
    page.get_by_label(label, exact=False).locator("visible=true").first.fill(str(value))


def test_a_class_is_sampled_watched_cancelled_and_remembered(page, shelf):
    choose(page, ".network", NETWORK)
    choose(page, ".class", "bee (1)")
    page.get_by_text("Solver and guidance").first.click()
    fill(page, "Steps", 400)
    page.locator("#sample").click()
    first = text_of(page, "#status", "noise level")
    page.wait_for_function("before => document.querySelector('#status').innerText !== before", arg=first)
    assert page.locator("#samples img").count() == 1  # it appears while it is denoised
    page.locator("#cancel").click()
    text_of(page, "#status", "cancelled")
    fill(page, "Steps", 3)
    page.locator("#sample").click()  # the place of the cancelled one is free
    text_of(page, "#status", "5 evaluations each")
    model = load(shelf.networks()[NETWORK], device="cpu")
    expected = grid_picture(model.sample(range(16), "bee", steps=3))
    assert np.array_equal(np.asarray(picture_of(page, "#samples")), np.asarray(expected))
    page.reload()
    page.locator("#history input").click()
    page.get_by_role("option").filter(has_text="16 from seed 0 · class 1").first.click()
    page.wait_for_function("() => document.querySelector('.class input').value.includes('bee')")


def test_an_image_is_changed_where_it_was_drawn_on(page):
    tab(page, "Explore")
    page.locator("#interpolate").click()
    page.locator("#frame img").wait_for()
    tab(page, "Variations and inpainting")
    page.locator("#take").click()
    canvas = page.locator("#canvas canvas").first
    canvas.wait_for()
    time.sleep(1)  # the canvas shows its image after the last event that can be waited for
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    page.mouse.move(x + 40, y, steps=5)
    page.mouse.up()
    time.sleep(0.5)
    page.locator("#inpaint").click()
    words = text_of(page, "#edit-status", "pixels are new")
    assert 0 < int(words.split()[0]) < 256
    page.locator("#vary").click()
    text_of(page, "#edit-status", "variations at noise level")


def test_a_click_shows_where_a_place_attends(page):
    tab(page, "Look inside")
    page.locator("#look").click()
    text_of(page, "#where", "50% down")
    before = page.locator("#heads img").first.get_attribute("src")
    page.locator("#clicked img").click(position={"x": 20, "y": 20})
    page.wait_for_function("() => !document.querySelector('#where').innerText.includes('50% down')")
    page.wait_for_function("before => document.querySelector('#heads img').src !== before", arg=before)
    assert page.locator("#bias img").count() > 0


def test_two_snapshots_are_compared(page):
    tab(page, "Compare")
    choose(page, ".network", FIRST, which=0)
    choose(page, ".network", NETWORK, which=1)
    page.locator("#compare").click()
    text_of(page, "#compare-status", "gray is equal")
    assert "PSNR" in text_of(page, "#numbers", "PSNR")
    assert picture_of(page, "#first").size == picture_of(page, "#difference").size


def test_a_run_moves_while_another_process_writes_it(page, shelf):
    tab(page, "Runs")
    run = shelf.runs_dir / "00000-a-debug-gpus1-batch8"
    choose(page, "#run", run.name)
    text_of(page, "#health", "1 kimg")
    write_stats(run, 2500, loss=0.25)
    assert "loss 0.25" in text_of(page, "#health", "2.5 kimg")
    tab(page, "Data")
    text_of(page, "#data", "12 images")


def test_nothing_went_wrong_and_nothing_left_the_machine(page):
    assert page.wrong == []
