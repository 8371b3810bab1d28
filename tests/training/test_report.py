"""The report of a run, and the page of near-copies: what they say, that names stay text, and how they behave."""

import json
import math
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffit.configs.presets import get_preset
from diffit.configs.resolve import DataFacts, resolve
from diffit.data import ImageArchive
from diffit.metrics.copies import Copies, write_copies
from diffit.training import pictures
from diffit.training.report import write_report
from diffit.training.runs import RunView
from diffit.utils.html import LARGE
from helpers import write_archive

pytest.importorskip("plotly", reason="curves need plotly: extra plot")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = '<img src="https://example.org" onerror=alert(1)></script>'


class Page(HTMLParser):
    """Tags with their attributes, and the text between them; what scripts and styles hold is left out."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.text, self.inside = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text += data

    def plots(self) -> list[dict]:
        return [json.loads(attrs["data-figure"]) for _, attrs in self.tags if attrs.get("class") == "plot"]


@pytest.fixture
def run(tmp_path):
    """40 kimg of a run with two metrics records, 35 grids, and names that a browser must not obey."""
    folder = tmp_path / "00000-a&b"
    folder.mkdir()
    config = resolve("small32", {"lr_decay": 0.0})
    config = config.model_copy(update={"data": config.data.model_copy(update={"class_names": (EVIL,)})})
    (folder / "training_options.json").write_text(config.model_dump_json())
    (folder / "log.txt").write_text(f"first\n{EVIL}\n")
    with (folder / "stats.jsonl").open("w") as file:
        for i in range(1, 41):
            line = {"images": 1000 * i, "loss": 1 / i, "loss_sigma_0_0.5": 2 / i, "sec": 90, "val_loss": 0.5}
            file.write(json.dumps(line | ({"loss": None} if i == 7 else {})) + "\n")
    with (folder / "metric-evil.jsonl").open("w") as file:
        for kimg, value in ((20, 3.0), (40, 4.0)):
            record = {"metric": f"fd10:{EVIL}", "kimg": kimg, "images": 1000 * kimg, "results": {"fd": value}}
            file.write(json.dumps(record) + "\n")
    for i in range(1, 36):
        Image.new("L", (16, 16), i).save(folder / f"fakes{i:06d}.png")
    noise = np.random.default_rng(0).integers(0, 256, (700, 700), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "reals.png")
    return folder


def test_the_loss_that_is_told_is_of_a_tick_though_the_last_line_be_of_a_step():
    training = get_preset("debug").training.model_copy(update={"tick": 0.04})
    config = get_preset("debug").model_copy(update={"training": training})
    stats = [{"images": 40, "loss": 0.9}, {"images": 80, "loss": 0.2}, {"images": 88, "loss": 0.8}]
    told = RunView(Path(), config, stats, [], {}, [], 0.0).health()
    assert any(line.startswith("loss 0.3") for line in told)  # (40 · 0.2 + 8 · 0.8)/48
    told = RunView(Path(), config, stats[:2], [], {}, [], 0.0).health()
    assert any(line.startswith("loss 0.2") for line in told)


def test_the_report_begins_with_what_a_person_wants_to_know(run):
    page = Page(write_report(run).read_text())
    assert "40,000 images, 1 h 0 min of training" in page.text
    assert "loss 0.025; 0.18 is usual after so many images" in page.text
    assert "best fd10:" in page.text
    assert "3 at 20 kimg" in page.text
    assert f"diffit metrics show '{run}'" in page.text
    order = [page.text.index(word) for word in ("40,000 images", "diffit sample", "training images", "Curves")]
    assert order == sorted(order)


def test_curves_are_the_statistics_and_smoothing_is_a_weighted_mean(run):
    by_name = {trace["name"]: trace for plot in Page(write_report(run).read_text()).plots() for trace in plot["data"]}
    loss, smoothed = by_name["loss"], by_name["smoothed"]
    assert loss["x"] == [i for i in range(1, 41) if i != 7]
    assert loss["y"] == [1 / i for i in range(1, 41) if i != 7]
    for n in (1, 2, 39):
        weights = [(1 - 1 / 3.9) ** (n - 1 - j) for j in range(n)]
        assert smoothed["y"][n - 1] == pytest.approx(np.average(loss["y"][:n], weights=weights))
    assert by_name["held-out images"]["y"] == [0.5] * 40
    assert by_name["σ 0 to 0.5"]["x"] == list(range(1, 41))
    assert by_name["usual"]["y"][-1] == 0.18


def test_names_stay_text_and_nothing_is_fetched(run):
    page = Page(write_report(run).read_text())
    assert page.text.count(EVIL) >= 3  # metric, class, log
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        assert not attrs.get("href")
        assert attrs.get("src", "data:").startswith("data:"), tag
    assert sum(tag == "script" for tag, _ in page.tags) == 3
    assert all(plot["config"]["showSendToCloud"] is False for plot in page.plots())


def test_many_grids_and_large_pictures_are_thinned_out(run):
    images = [attrs["src"] for tag, attrs in Page(write_report(run).read_text()).tags if tag == "img"]
    assert len(images) == 31  # 30 of the 35 grids, and the training images
    assert (run / "reals.png").stat().st_size > LARGE
    assert images[0].startswith("data:image/jpeg")
    assert len(images[0]) < 1.4 * (run / "reals.png").stat().st_size


def test_a_run_that_has_nothing_yet_has_a_report(tmp_path):
    folder = tmp_path / "00000-new"
    folder.mkdir()
    assert "0 images, 0 s of training" in Page(write_report(folder).read_text()).text


def test_the_page_of_near_copies_begins_with_its_verdict_and_a_histogram(tmp_path):
    rng = torch.Generator().manual_seed(0)
    samples, real = torch.rand(200, generator=rng), 0.2 + torch.rand(1000, generator=rng)
    facts = {"samples": 200, "yardstick": EVIL, "near_copies": 0.21, "near_copies_among_real": 0.01}
    facts["farther_than_real"] = 0.0
    image = torch.zeros(1, 4, 4, dtype=torch.uint8)
    copies = Copies(facts, [[image] * 2], torch.tensor([[0.1]]), (samples, real), 0.21)
    write_copies(tmp_path / "copies.html", copies)
    page = Page((tmp_path / "copies.html").read_text())
    assert page.text.split("\n")[3].startswith("The network repeats training images: 21.00%")
    (plot,) = page.plots()
    for trace, values in zip(plot["data"], (samples, real), strict=True):
        width = trace["x"][1] - trace["x"][0]
        inside = [sum(abs(float(v) - x) < width / 2 for v in values) / len(values) for x in trace["x"]]
        assert trace["y"] == pytest.approx([100 * share for share in inside], abs=0.2)
    facts["near_copies"] = 0.01 + 1.9 * math.sqrt(0.01 * 0.99 / 200)
    assert copies.verdict().startswith("No sign of copying")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_the_slider_moves_the_curves_are_drawn_and_nothing_is_asked_for(run, width):
    playwright = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright")
    path, wrong = write_report(run), []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(60_000)
        page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.as_uri())
        page.wait_for_function("document.querySelectorAll('.main-svg').length > 6")
        caption = page.locator("figcaption:visible", has_text="sampled after")
        assert caption.all_inner_texts() == ["sampled after 35 kimg"]
        page.locator("input[type=range]").fill("0")
        assert caption.all_inner_texts() == ["sampled after 1 kimg"]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert not page.get_by_text("Share chart").count()
        browser.close()
    assert not wrong


def test_without_plotly_the_report_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    page = Page(write_report(run).read_text())
    assert "pip install 'diffit-torch[plot]'" in page.text
    assert "best fd10:" in page.text


def test_rows_of_one_class_show_other_images_of_it(tmp_path, monkeypatch):
    """Four rows for three classes of eight images: the two rows of the first have four each."""
    shown = {}
    monkeypatch.setattr(pictures, "save_grid", lambda images, path, grid, names: shown.update(images=images))
    archive = ImageArchive(write_archive(tmp_path / "pets.zip", 24), cond=True)
    config = resolve("debug", {"cond": True, "grid": (4, 4)}, DataFacts(3, (16, 16), 3))
    pictures.save_reals(SimpleNamespace(config=config), archive, tmp_path / "reals.png")
    rows = shown["images"].flatten(1).unflatten(0, (4, 4))
    assert len(rows.flatten(0, 1).unique(dim=0)) == 16
    of = [
        {int(archive.labels[i]) for i in range(24) for image in row if (archive[i].flatten() == image).all()}
        for row in rows
    ]
    assert of == [{0}, {0}, {1}, {2}]
