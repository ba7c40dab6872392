"""The page in a real browser, on the real service with the smallest checkpoint. Skipped without Debian's Chromium."""

import base64
import hashlib
import json
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright

from m2d.generation.plan import seed_of
from m2d.serving.app import PAGE, create_app
from m2d.serving.settings import ServeConfig, ServingLimits
from tests.serving.conftest import LocalService, Serve, new_key

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium: `make test` installs Debian's package of that name where it is root"
)
PATIENCE_MS = 60_000  # other tests may have the processors
expect.set_options(timeout=PATIENCE_MS)
SERVED = ("free", "keyed")  # the same service without keys, and with


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A key, and the file of its hash."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    return new_key(file, "annotator"), file


@pytest.fixture(scope="module")
def urls(
    config: ServeConfig, key: tuple[str, Path], serve: Serve, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Of the service without keys and with; at most 12 images may wait, so that it is soon overloaded."""
    free = replace(config, directory=str(tmp_path_factory.mktemp("page")), limits=ServingLimits(queued_images=12))
    service = LocalService(free)
    apps = [create_app(service, free), create_app(service, replace(free, keys=str(key[1])))]
    return dict(zip(SERVED, serve(*apps, jobs=service.jobs)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, urls: dict[str, str]) -> Iterator[Open]:
    """A function that opens the page anew. Nothing may be asked of another host, and the console stays silent."""
    contexts: list[BrowserContext] = []
    faults: list[str] = []

    def open_it(served: str = "free", started: bool = True, **options: Any) -> Page:
        context = browser.new_context(**{"locale": "en-GB", "viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        # Chromium itself says there that an answer was an error, or did not come; the page says so to the user.
        page.on("console", lambda said: None if "Failed to load resource" in said.text else faults.append(said.text))
        allowed = (urls[served], "blob:", "data:")
        page.on("request", lambda asked: None if asked.url.startswith(allowed) else faults.append(asked.url))
        page.goto(urls[served])
        if started:
            expect(page.locator("#order")).to_be_visible()
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert faults == []


def draw(page: Page, code: str = "MEL", **values: str) -> None:
    """Order images by the form, and wait for the last."""
    page.locator(f"#order input[value={code}]").check()
    for name, value in values.items():
        page.locator(f"#{name}").fill(value)
    page.get_by_role("button", name="Draw").click()
    expect(page.locator(".set").first).to_have_attribute("aria-busy", "false")


def pixels_shown(page: Page) -> np.ndarray:
    """Of the image in the dialog: RGBA, with a sign."""
    values = page.locator("#picture img").first.evaluate(
        "image => { const area = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext('2d');"
        " area.drawImage(image, 0, 0);"
        " return [...area.getImageData(0, 0, image.naturalWidth, image.naturalHeight).data] }"
    )
    return np.array(values, np.int16)


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_arrive_with_previews_and_the_same_seed_gives_the_same_image(open_page: Open) -> None:
    page = open_page()
    page.evaluate(
        "new MutationObserver(() => { window.seen ||= !!document.querySelector('.preview img') })"
        ".observe(document, { childList: true, subtree: true })"
    )
    draw(page, "MEL", count="3")
    expect(page.locator(".set .open img")).to_have_count(3)
    assert page.evaluate("window.seen") is True
    expect(page.get_by_role("status")).to_have_text("Done: 3 images.")

    seed = re.search(r"seed (\d+)", page.locator(".facts").inner_text())[1]
    page.locator(".open").nth(2).click()
    facts = page.locator("#picture dl")
    expect(facts).to_contain_text(str(seed_of(f"{seed}/MEL/2")))  # 63 bits: JavaScript's numbers have 53
    expect(facts).to_contain_text("none at work")
    expect(page.locator("#picture pre")).to_contain_text('"mode": "standard"')
    first = pixels_shown(page)
    assert first.size == 4 * 16 * 16
    page.get_by_role("button", name="Use this seed again").click()
    assert [page.locator(f"#{name}").input_value() for name in ("seed", "count")] == [seed, "1"]
    page.locator("#order input[value=NV]").check()  # and back: the form alone decides
    draw(page, "MEL")
    page.locator(".open").first.click()
    assert abs(pixels_shown(page) - first).max() <= 1  # the first was drawn with two others


def test_reference_image_is_varied(open_page: Open, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "lesion.png")
    page = open_page()
    page.get_by_label("An image", exact=True).check()
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_role("alert")).to_have_text("Choose an image first.")
    page.get_by_label("Reference image").set_input_files(tmp_path / "lesion.png")
    expect(page.locator(".drop").first).to_contain_text("lesion.png")
    page.get_by_role("button", name="Remove").click()
    expect(page.locator(".drop").first).to_contain_text("Drop an image here")
    page.get_by_label("Noise").check()
    encoded = base64.b64encode((tmp_path / "lesion.png").read_bytes()).decode()
    dropped = page.evaluate_handle(
        """encoded => {
            const bytes = Uint8Array.from(atob(encoded), one => one.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
            return transfer;
        }""",
        encoded,
    )
    page.dispatch_event("#sets", "drop", {"dataTransfer": dropped})
    expect(page.locator(".drop").first).to_contain_text("dropped.png")
    page.get_by_label("Strength").fill("0.4")
    draw(page, "NV", count="2")
    page.locator(".open").first.click()
    expect(page.locator("#picture dl")).to_contain_text("0.4")
    name = hashlib.sha256((tmp_path / "lesion.png").read_bytes()).hexdigest()
    expect(page.locator("#picture pre")).to_contain_text(f'"reference": "{name}.png"')


def test_tray_survives_a_reload_and_is_downloaded_with_its_manifest(open_page: Open) -> None:
    page = open_page()
    draw(page, "DF", count="2")
    page.get_by_role("button", name="Keep all").click()
    draw(page, "BCC", count="1")
    page.locator(".keep").first.click()
    expect(page.get_by_role("link", name="Tray 3")).to_be_visible()
    page.reload()
    page.get_by_role("link", name="Tray 3").click()
    expect(page.locator("#tray .open img")).to_have_count(3)
    page.get_by_role("button", name="Keep DF_000001").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download all").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.testzip() is None
        manifest = json.loads(archive.read("manifest.json"))
        assert [row["id"] for row in manifest["images"]] == ["DF_000000", "BCC_000000"]
        for row in manifest["images"]:
            assert hashlib.sha256(archive.read(row["path"])).hexdigest() == row["sha256"]
            assert row["seed"] == seed_of(f"{row['request']['seed']}/{row['id'].replace('_00000', '/')}")


def test_order_can_be_cancelled(open_page: Open) -> None:
    page = open_page()
    page.get_by_text("More settings").first.click()
    page.locator("#order-steps").fill("100")
    page.locator("#count").fill("12")
    page.get_by_role("button", name="Draw").click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".set .state")).to_have_text(re.compile(r"Cancelled: \d+ of 12 images"))
    draw(page, "MEL", count="12", **{"order-steps": "2"})  # nothing of the first is waited for
    expect(page.locator(".set .open img")).to_have_count(12)


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_balanced_set_is_ordered_watched_and_downloaded(open_page: Open, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    for code, count in {"NV": 3, "mel": 2, "DF": 1, "elsewhere": 4}.items():
        (folder / code).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (4, 4)).save(folder / code / f"{number}.png")
    page = open_page()
    page.get_by_role("link", name="Jobs").click()
    page.get_by_label("Count a folder").set_input_files(folder)
    expect(page.get_by_label("Images of melanoma")).to_have_value("2")
    for name in ("actinic keratosis", "basal cell carcinoma", "benign keratosis", "vascular lesion"):
        page.get_by_label(f"Images of {name}").fill("3")
    expect(page.locator("#counts tfoot")).to_contain_text("3")  # one melanoma, two dermatofibromas
    page.get_by_role("button", name="Order").click()
    job = page.locator("article")
    expect(job.locator(".state")).to_have_text("done")
    expect(job).to_contain_text("3 of 3")
    job.get_by_text("Images", exact=True).click()
    expect(job.locator(".open img")).to_have_count(3)
    with page.expect_download() as download:
        job.get_by_role("button", name="Download tar").click()
    with tarfile.open(download.value.path()) as archive:
        pngs = [name for name in archive.getnames() if name.endswith(".png")]
    assert sorted(pngs) == ["DF_000000.png", "DF_000001.png", "MEL_000000.png"]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_errors_are_said_with_what_to_do(open_page: Open) -> None:
    page = open_page()
    draw(page, seed="9" * 20)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("seed")
    draw(page, seed="1", count="16")
    expect(alert.first).to_contain_text("at most 12 may")
    expect(alert.first).to_contain_text(re.compile(r"It can be tried again in \d+ s"))
    again = alert.first.get_by_role("button", name="Try again")
    expect(again).to_be_disabled()
    expect(again).to_be_enabled()


def test_service_that_is_gone_is_said(open_page: Open) -> None:
    page = open_page()
    page.route("**/v1/images", lambda route: route.abort())
    draw(page)
    expect(page.get_by_role("alert")).to_contain_text("does not answer")


def test_key_is_asked_for_once(open_page: Open, key: tuple[str, Path]) -> None:
    page = open_page("keyed", started=False)
    dialog = page.get_by_role("dialog")
    page.get_by_label("API key").fill("a guess")
    page.get_by_role("button", name="Use this key").click()
    expect(dialog).to_contain_text("not accepted")
    page.get_by_label("API key").fill(key[0])
    page.keyboard.press("Enter")
    draw(page, count="1")
    expect(page.locator(".open img")).to_have_count(1)
    page.reload()
    expect(page.locator("#order")).to_be_visible()
    expect(dialog).to_be_hidden()
    page.get_by_role("button", name="Forget key").click()
    expect(dialog).to_be_visible()


# --- everybody --------------------------------------------------------------------------------------------------------


def test_images_are_leafed_through_in_their_order_however_they_came(open_page: Open) -> None:
    page = open_page()

    def last_first(route: Route) -> None:
        answer = route.fetch()
        lines = answer.text().splitlines()
        images = [line for line in lines if json.loads(line)["event"] == "image"]
        images.sort(key=lambda line: -json.loads(line)["index"])
        started, done = lines[0], lines[-1]
        route.fulfill(response=answer, body="\n".join([started, *images, done]) + "\n")

    page.route("**/v1/images", last_first)
    draw(page, "DF", count="2")
    page.locator(".set .open").first.click()
    expect(page.get_by_role("dialog")).to_contain_text("DF_000000")
    page.get_by_role("button", name="Next").click()
    expect(page.get_by_role("dialog")).to_contain_text("DF_000001")


def test_keyboard_alone_is_enough(open_page: Open) -> None:
    page = open_page()

    def tab_to(selector: str) -> None:
        for _ in range(40):
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"no tab reaches {selector}")

    tab_to("[name=class]")
    page.keyboard.press("ArrowDown")
    tab_to("#count")
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("2")
    tab_to("#order button.main")
    page.keyboard.press("Enter")
    expect(page.locator(".set .open")).to_have_count(2)
    tab_to(".open")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("BCC_000000")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("dialog")).to_contain_text("BCC_000001")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.className") == "open"
    tab_to(".keep")
    page.keyboard.press("Space")
    expect(page.get_by_role("link", name="Tray 1")).to_be_visible()


def test_chinese_browser_reads_chinese_and_may_switch(open_page: Open) -> None:
    page = open_page(locale="zh-CN")
    expect(page.locator("html")).to_have_attribute("lang", "zh-Hans")
    expect(page.locator("#classes")).to_contain_text("黑色素瘤")
    expect(page.locator("footer")).to_contain_text("不得用于诊断")
    page.locator("#count").fill("1")
    page.get_by_role("button", name="生成").click()
    expect(page.locator(".set .open")).to_have_count(1)
    page.get_by_role("button", name="English").click()
    expect(page.locator("#sets h2")).to_have_text("AKIEC actinic keratosis")
    page.reload()
    expect(page.locator("footer")).to_contain_text("Not for diagnosis")


def test_both_languages_say_the_same_things(open_page: Open) -> None:
    page = open_page()
    keys = page.evaluate("import('/texts.js').then(({TEXTS}) => [TEXTS.en, TEXTS.zh].map(Object.keys))")
    assert keys[0] == keys[1]
    used = {
        key for file in PAGE.glob("*.html") for key in re.findall(r'data-(?:words|label)="(\w+)"', file.read_text())
    }
    assert used <= set(keys[0])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_violation(theme: str, open_page: Open) -> None:
    page = open_page(reduced_motion="reduce")
    while page.locator("html").get_attribute("data-theme") != theme:
        page.get_by_role("button", name="Theme").click()
    axe = Axe()

    def look(where: str) -> None:
        found = axe.run(page, options={"resultTypes": ["violations"]})
        assert found.violations_count == 0, f"{where}: {found.generate_report()}"

    draw(page, seed="9" * 20)
    draw(page, seed="1", count="2")
    page.locator(".keep").first.click()
    page.get_by_label("An image", exact=True).check()
    page.get_by_text("More settings").first.click()
    look("draw")
    page.locator(".open").first.click()
    look("picture")
    page.keyboard.press("Escape")
    page.get_by_role("link", name="Tray").click()
    look("tray")
    page.get_by_role("link", name="Jobs").click()
    look("jobs")


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("locale", ["en-GB", "zh-CN"])
def test_nothing_is_wider_than_the_window(width: int, locale: str, open_page: Open) -> None:
    page = open_page(viewport={"width": width, "height": 700}, locale=locale)
    for view in ("draw", "tray", "jobs"):
        page.evaluate("view => { location.hash = view }", view)
        expect(page.locator(f"#{view}")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
