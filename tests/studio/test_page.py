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
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium"),
]

from diffit.sampling import load  # noqa: E402
from diffit.studio.common import grid_picture  # noqa: E402
from helpers import start  # noqa: E402

FIRST, NETWORK = (f"{kimg} kimg · 00000-a-debug-gpus1-batch8" for kimg in (1, 2))
SECONDS = 200  # that anything may take on a busy machine


@pytest.fixture(scope="module")
def opened(served):
    """The page in a browser, and what went wrong in it or went elsewhere."""
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


@pytest.fixture
def page(opened):
    opened.wrong.clear()
    yield opened
    assert opened.wrong == []


def is_elsewhere(url: str) -> bool:
    parts = urlparse(url)
    return parts.scheme not in ("data", "blob", "about") and parts.hostname != "127.0.0.1"


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def vary_and_inpaint(page) -> None:
    tab(page, "Explore")
    tab(page, "Vary and inpaint")


def choose(page, place: str, value: str, which: int = 0) -> None:
    field = page.locator(f"{place}:visible input").nth(which)
    field.fill(value)
    field.press("Enter")


def fill(page, label: str, value: object) -> None:
    field = page.get_by_label(label, exact=True).locator("visible=true").first
    field.fill(str(value))
    field.press("Tab")  # as a person leaves it


def text_of(page, place: str, words: str) -> str:
    """The text of a place, once it has these words."""
    page.locator(place).filter(has_text=words).wait_for()
    return page.locator(place).inner_text()


def another(page, place: str, before: str) -> str:
    """The source of the first image of a place, once it is not ``before`` any more."""
    image = f"{place} img"
    page.wait_for_function("([i, b]) => (document.querySelector(i)?.src ?? b) !== b", arg=[image, before])
    return page.locator(image).first.get_attribute("src")


def picture_of(page, place: str) -> np.ndarray:
    source = page.locator(f"{place} img").first.get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB"))


def said(page) -> str:
    """The line in which the page says what is not possible."""
    words = page.locator(".toast-body").first.inner_text()
    page.get_by_test_id("toast-close").first.click()
    return words


def test_a_class_is_sampled_watched_cancelled_and_remembered(page, shelf):
    choose(page, ".class", "bee (1)")
    page.get_by_text("Solver and guidance").first.click()
    fill(page, "Steps", 900)
    page.locator("#sample").click()
    first = text_of(page, "#status", "of 900")
    page.wait_for_function("before => document.querySelector('#status').innerText !== before", arg=first)
    page.locator("#samples img").wait_for()  # it appears while it is denoised
    page.locator("#cancel").click()
    text_of(page, "#status", "not finished")
    fill(page, "Steps", 3)
    page.locator("#sample").click()  # the place of the cancelled one is free
    text_of(page, "#status", "5 evaluations each")
    expected = grid_picture(load(shelf.networks()[NETWORK], device="cpu").sample(range(16), "bee", steps=3))
    assert np.array_equal(picture_of(page, "#samples"), expected)
    page.reload()
    page.locator("#history input").click()
    page.get_by_role("option").filter(has_text="16 from seed 0 · class 1").first.click()
    page.wait_for_function("() => document.querySelector('.class input').value.includes('bee')")


def test_a_slider_goes_from_one_sample_to_the_other(page):
    tab(page, "Explore")
    fill(page, "Steps", 2)
    page.locator("#interpolate").click()
    text_of(page, "#between-status", "16 frames")
    before = another(page, "#frame", "")
    fill(page, "number input for Position between the two, in percent", 100)
    another(page, "#frame", before)


def test_an_image_is_changed_where_it_was_painted_on(page):
    vary_and_inpaint(page)
    page.locator("#take").click()
    text_of(page, "#edit-status", "The sample of seed 0")
    paint(page)
    page.locator("#inpaint").click()
    words = text_of(page, "#edit-status", "pixels are new")
    assert 0 < int(words.split()[0]) < 256
    page.locator("#vary").click()
    text_of(page, "#edit-status", "4 variations")


def paint(page) -> None:
    """A stroke over the middle of the canvas, which takes none before it shows its image."""
    canvas = page.locator("#canvas canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    until = time.monotonic() + SECONDS
    while not is_brushed(canvas):
        assert time.monotonic() < until, "the canvas takes no stroke"
        page.mouse.move(x - 40, y)
        page.mouse.down()
        page.mouse.move(x + 40, y, steps=5)
        page.mouse.up()


def is_brushed(canvas) -> bool:
    """Whether its middle has the colour of the brush; a stroke is seen some frames after it was made."""
    shown = Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")
    return shown.getpixel((shown.width // 2, shown.height // 2)) == (0xFF, 0x4D, 0x6D)


def test_an_upload_that_is_no_image_is_said_in_one_line(page, tmp_path):
    vary_and_inpaint(page)
    (tmp_path / "a.png").write_text("just text")
    upload(page, tmp_path / "a.png")
    assert "not an image of a known format" in said(page)
    Image.new("RGB", (40, 20), "red").save(tmp_path / "b.png")
    upload(page, tmp_path / "b.png")
    text_of(page, "#edit-status", "Your image")


def upload(page, path) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator("#upload").click()
    chooser.value.set_files(path)


def test_a_click_shows_where_a_place_attends(page):
    tab(page, "Look inside")
    fill(page, "Steps", 2)
    page.locator("#look").click()
    text_of(page, "#where", "50% down")
    before = another(page, "#heads", "")
    page.locator("#clicked img").click(position={"x": 20, "y": 20})
    another(page, "#heads", before)
    assert "50% down" not in page.locator("#where").inner_text()
    assert page.locator("#bias img").count() > 0
    assert page.locator("#norms canvas, #norms svg").count() > 0


def test_two_snapshots_are_compared(page):
    tab(page, "Compare")
    choose(page, ".class", "bee (1)")
    choose(page, ".network", FIRST, which=0)
    choose(page, ".network", NETWORK, which=1)
    page.locator("#compare").click()
    assert "PSNR" in text_of(page, "#compare-status", "Gray is where both are equal")
    text_of(page, "#numbers", "evaluations per image")
    assert page.locator(".class:visible input").input_value() == "bee (1)"  # which both networks have
    assert picture_of(page, "#first").shape == picture_of(page, "#difference").shape


def test_a_run_moves_while_another_process_trains_it(page, shelf, tmp_path):
    tab(page, "Runs")
    words = ["--data", str(shelf.data), "--outdir", str(shelf.runs_dir), "--preset", "debug", "--desc", "live"]
    words += ["--kimg", "1000", "--tick", "0.1", "--snap", "1000", "--workers", "0"]
    [training] = start("diffit", "train", *words, output=tmp_path)
    try:
        choose(page, "#run", name_of_run(shelf, "live"))
        page.locator("#health").filter(has_text="of 1,000").filter(has_text="loss").wait_for()
        before = page.locator("#health").inner_text()
        kimg = "text => Number(text.match(/([\\d.]+) kimg/)?.[1] ?? 0)"
        page.wait_for_function(
            f"before => ({kimg})(document.querySelector('#health').innerText) > ({kimg})(before)", arg=before
        )
    finally:
        training.kill()
        training.join()
    assert page.locator(".curve canvas, .curve svg").count() > 0


def name_of_run(shelf, part: str) -> str:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if found := [name for name in shelf.runs() if part in name]:
            return found[0]
        time.sleep(0.1)
    raise TimeoutError("the training has not begun")


def test_the_data_and_the_training_images_nearest_to_a_sample_are_shown(page):
    tab(page, "Data")
    text_of(page, "#data", "12 images")
    page.locator("#find").click()
    page.locator("#nearest img").nth(5).wait_for()
