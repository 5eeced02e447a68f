"""The report of a run: what stands in it, that nothing from outside gets out of its place, and how it behaves."""

import base64
import csv
import dataclasses
import hashlib
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthseg.errors import OutputError
from synthseg.inference import Segmentation
from synthseg.labels import load_scheme
from synthseg.quality import Quality
from synthseg.reports.figures import Distribution, timing_bar
from synthseg.reports.html_report import (
    MANY_SCANS,
    MANY_WIDTH_PX,
    ReportEntry,
    failed_entry,
    report_entry,
    skipped_entry,
    write_html_report,
)
from synthseg.volume import Volume

TABLE = load_scheme("siam16")
HOSTILE = "/data/</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;{{7*7}}\udcff\u202e.nii.gz"
CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def scan(seed: int = 0) -> tuple[Volume, Segmentation]:
    """One litre in 25 × 20 × 10 voxels of 4 × 5 × 10 mm: 600 ml GM and 50 ml hippocampus, the rest air."""
    labels = np.zeros((25, 20, 10), np.uint8)
    labels.reshape(-1)[1000:4000] = 1
    labels.reshape(-1)[4000:4250] = 12
    data = np.random.default_rng(seed).uniform(0, 100, labels.shape).astype(np.float32)
    volume = Volume(data, np.diag([-4.0, 5.0, 10.0, 1.0]))
    hard_ml = dict.fromkeys(TABLE.names, 0.0) | {"Background": 350.0, "GM": 600.0, "Hippocampus": 50.0}
    soft_ml = dict.fromkeys(TABLE.names, 0.0) | {"Background": 340.0, "GM": 605.0, "Hippocampus": 55.0}
    timings_s = {"read": 1.0, "network": 3.0}
    return volume, Segmentation(labels, volume.affine, TABLE, hard_ml, soft_ml, timings_s=timings_s)


def quality(score: float | None, *flags: str) -> Quality:
    structures = {"GM": 0.9, "Hippocampus": 0.71} if score is not None else {}
    note = "" if score is not None else "model 'x' has no calibration"
    return Quality(structures, score, flags, not flags, note)


def entry(
    name: str, hippocampus_ml: float = 50.0, score: float | None = 0.9, flags: tuple[str, ...] = ()
) -> ReportEntry:
    volume, segmentation = scan()
    segmentation.quality = quality(score, *flags)
    segmentation.warnings = list(flags)
    segmentation.hard_ml["Hippocampus"] = hippocampus_ml
    return report_entry(name, volume, segmentation)


MANIFEST = {"model": "siam16", "synthseg": "0.1.0", "versions": {"torch": "2.13"}, "options": ["a", "b"], "none": None}


def page_of(path: Path, entries: list[ReportEntry], manifest: dict[str, Any] | None = None) -> str:
    write_html_report(path, entries, MANIFEST if manifest is None else manifest)
    return path.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Start tags, their attributes, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._silent = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._silent = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._silent = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._silent else data


# ------------------------------------------------------------------------------------------------ entries


def test_an_entry_holds_what_the_segmentation_says() -> None:
    one = entry("a.nii.gz", flags=("the vertex is outside", "the vertex is outside"))
    assert one.volumes["intracranial_ml"] == one.volumes["brain_ml"] == 650
    assert one.volumes["Hippocampus_soft_ml"] == 55
    assert all(isinstance(value, float | int) for value in one.volumes.values())
    assert one.flags == ("the vertex is outside",)
    assert one.facts == {"voxels": "25 × 20 × 10", "voxel size": "4 × 5 × 10 mm", "orientation": "LAS"}
    assert one.timings_s == {"read": 1, "network": 3}
    assert one.mosaic is not None


def test_states() -> None:
    done = entry("a")
    assert done.state == "ok"
    assert entry("a", score=None).state == "ok"
    assert dataclasses.replace(done, quality=None).state == "done"
    assert entry("a", flags=("look",)).state == "look"
    assert dataclasses.replace(done, quality=Quality({}, 0.3, (), False)).state == "look"
    assert failed_entry("a", ValueError("broken")).state == "failed"
    assert failed_entry("a", ValueError()).error == "ValueError"
    assert skipped_entry("a").state == "unknown"
    row = {"scan": "a", "GM_ml": "600.000", "GM_soft_ml": "n/a"}
    assert skipped_entry("a", row=row).state == "done"
    assert skipped_entry("a", row={**row, "predicted_dice": "n/a", "passed": "yes"}).state == "ok"
    assert skipped_entry("a", row={**row, "predicted_dice": "0.310", "passed": "no"}).state == "look"


def test_a_skipped_scan_is_counted_from_its_label_map() -> None:
    volume, segmentation = scan()
    known = skipped_entry("a", volume=volume, labels=segmentation.labels, table=TABLE)
    assert known.status == "skipped"
    assert known.mosaic is not None
    assert {key: value for key, value in known.volumes.items() if value} == {
        "intracranial_ml": pytest.approx(650), "brain_ml": pytest.approx(650),
        "GM_ml": pytest.approx(600), "Hippocampus_ml": pytest.approx(50),
    }  # fmt: skip
    row = skipped_entry("a", row={"GM_ml": "1.5", "GM_soft_ml": "n/a"}).volumes
    assert row["GM_ml"] == 1.5
    assert np.isnan(row["GM_soft_ml"])


def test_a_skipped_scan_keeps_the_verdict_of_its_row(tmp_path: Path) -> None:
    volume, segmentation = scan()
    judged = {"poor": ("0.312", "no"), "good": ("0.854", "yes"), "flagged": ("n/a", "no")}
    entries = [
        skipped_entry(name, row={"GM_ml": "600.000", "predicted_dice": score, "passed": passed})
        for name, (score, passed) in judged.items()
    ]
    entries.append(skipped_entry("unjudged", volume=volume, labels=segmentation.labels, table=TABLE))
    text = " ".join(Elements(page_of(tmp_path / "r.html", entries)).text.split())
    assert "1 passed 1 done, not judged2 to look at 0 failed 0.58 median predicted Dice" in text
    reason = "an earlier run judged that this scan should be looked at"
    assert f"look earlier run poor {reason} look earlier run flagged {reason} Scans" in text
    assert "poor look earlier run 0.31 – – 600" in text
    assert "good passed earlier run 0.85 – – 600" in text
    assert "unjudged done earlier run – 650 650 600" in text


def test_pictures_of_a_large_batch_are_smaller() -> None:
    volume, segmentation = scan()
    few, many = (report_entry("a", volume, segmentation, n_scans=n) for n in (MANY_SCANS, MANY_SCANS + 1))
    assert few.mosaic is not None
    assert many.mosaic is not None
    assert many.mosaic.size[0] <= MANY_WIDTH_PX < few.mosaic.size[0]


def test_figures_by_hand() -> None:
    def is_far(values: np.ndarray, value: float) -> bool:
        return Distribution.of(list(enumerate(values)), most_dots=3).is_far(value)

    values = np.array([9.0, 10, 10, 11, 11, 12, 12, 13, 13, 14])  # median 11.5; distances 0.5 to 2.5, their median 1.5
    assert is_far(values, 11.5 + 3.6 * 1.5 / 0.6745)
    assert not is_far(values, 11.5 + 3.4 * 1.5 / 0.6745)
    assert is_far(values, 11.5 - 3.6 * 1.5 / 0.6745)
    assert not is_far(values[:9], 100.0)
    assert not is_far(np.full(20, 3.0), 4.0)
    assert not is_far(values, float("nan"))
    all_values = Distribution.of(list(enumerate(values)), most_dots=3)
    assert all_values.place(9) == pytest.approx(6)
    assert all_values.place(14) == pytest.approx(154)
    assert all_values.place(11.5) == pytest.approx(80)
    assert [number for number, *_ in all_values.dots] == [0, 1, 9]
    assert timing_bar({"a": 1.0, "b": 3.0}) == [("a", 1.0, 0.0, 25.0), ("b", 3.0, 25.0, 75.0)]


# --------------------------------------------------------------------------------------------------- page


def test_what_comes_from_outside_stays_text(tmp_path: Path) -> None:
    """The same elements and attribute names, whatever the texts are."""
    flags = ("a </td><script>alert(3)</script>",)

    def page(name: str, flag: tuple[str, ...], manifest: dict[str, Any]) -> Elements:
        plain, other = entry("/data/b.nii.gz"), entry(name, flags=flag)
        entries = [other, plain, failed_entry(name + "x", f"{flag[0]}\x00\nend")]
        return Elements(page_of(tmp_path / "r.html", entries, manifest))

    hostile = page(HOSTILE, flags, {"model": HOSTILE, "command": flags[0], HOSTILE: {flags[0]: HOSTILE}})
    harmless = page("/data/x/a.nii.gz", ("f",), {"model": "m", "command": "c", "x": {"y": "z"}})
    assert hostile.tags == harmless.tags
    assert hostile.tags["script"] == 2
    names = [Counter((tag, name) for tag, name, _ in page.attributes) for page in (hostile, harmless)]
    assert names[0] == names[1]
    assert not any(name.startswith("on") for _, name, _ in hostile.attributes)
    assert "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;{{7*7}}" in hostile.text
    assert "\u202e" not in hostile.text
    assert "\x00" not in hostile.text


def test_the_file_is_complete_and_allows_nothing_else(tmp_path: Path) -> None:
    page = page_of(tmp_path / "r.html", [entry("a"), entry("b")])
    elements = Elements(page)
    for tag, name, value in elements.attributes:
        if name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert value.startswith(("data:image/webp;base64,", "#")), (tag, name, value[:50])
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[\w+/=]+", "", page))
    (policy,) = (
        v for tag, name, v in elements.attributes if tag == "meta" and name == "content" and "default-src" in v
    )
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_numbers_are_found_in_the_table(tmp_path: Path) -> None:
    low, other = entry("/d/s/a.nii.gz", 4.251), dataclasses.replace(entry("/d/s/b.nii.gz"), volumes={"GM_ml": np.nan})
    text = " ".join(Elements(page_of(tmp_path / "r.html", [low, other])).text.split())
    assert "in /d/s/" in text
    assert "a.nii.gz passed 0.90 604 604 600 0.00" in text
    assert "4.25" in text
    assert "nan" not in text.lower()
    assert "torch2.13" in text
    assert "a, b" in text


@pytest.mark.parametrize("n", [0, 1, 2])
def test_any_number_of_scans_and_any_lack_of_facts(tmp_path: Path, n: int) -> None:
    bare = [failed_entry("a", "broken"), skipped_entry("b")][:n]
    page = page_of(tmp_path / "r.html", bare, {})
    assert f"{n} scan{'' if n == 1 else 's'}</title>" in page
    assert json.loads(re.findall(r'id="numbers">(.*?)</script>', page)[0])["names"] == ["a", "b"][:n]


def test_two_or_three_scans_are_not_compared(tmp_path: Path) -> None:
    entries = [entry("a"), entry("b"), entry("c"), dataclasses.replace(entry("d"), volumes={})]
    assert "Volumes over the batch" not in page_of(tmp_path / "r.html", entries)
    entries[3] = entry("d", 51.0)
    page = page_of(tmp_path / "r.html", entries)
    assert "Volumes over the batch" in page
    assert "Hippocampus: median 50.0 ml, from 50.0 to 51.0 ml" in page


def test_without_calibration_the_page_says_so(tmp_path: Path) -> None:
    page = page_of(tmp_path / "r.html", [entry("a", score=None), entry("b", score=None)])
    assert "has no calibration" in page
    assert "passed</span>" not in page
    assert "no flags</span>" in page


def test_the_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.html").write_text("old")
    broken = dataclasses.replace(entry("a"), timings_s={"read": None})
    with pytest.raises(TypeError):
        write_html_report(tmp_path / "r.html", [broken], {})
    assert (tmp_path / "r.html").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"r\.html"):
        write_html_report(tmp_path / "file" / "r.html", [], {})


# ------------------------------------------------------------------------------------------------ browser

NAMES = ["/d/sub-9/a.nii.gz", "/d/sub-10/b.nii.gz", "/d/sub-1/c.nii.gz", HOSTILE.replace("/data", "/d"), "/d/e.nii.gz"]


class Page:
    """The report of five scans in a browser: 50, 9.5, 100 and 75 ml of hippocampus, and one that failed."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver, self.folder = driver, folder
        self.open("many")

    def open(self, name: str, anchor: str = "") -> None:
        self.driver.get("about:blank")
        self.driver.get((self.folder / f"{name}.html").as_uri() + anchor)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def shown(self) -> list[int]:
        """Numbers of the rows that are shown, from above."""
        return self.js(
            "return [...document.querySelectorAll('#table tbody tr')].filter(r => r.offsetParent || r.offsetHeight)"
            ".map(r => Number(r.dataset.number))"
        )

    def click(self, selector: str) -> None:
        self.js("document.querySelector(arguments[0]).click()", selector)

    def sort(self, title: str) -> str:
        """Click a heading, and return how it says that the table is sorted."""
        return self.js(
            "const all = [...document.querySelectorAll('#table thead th')];"
            "const h = all.find(h => h.textContent.startsWith(arguments[0]));"
            "h.querySelector('button').click(); return h.getAttribute('aria-sort')",
            title,
        )

    def look_for(self, query: str) -> list[int]:
        self.js(
            "const q = document.querySelector('#query'); q.value = arguments[0]; q.dispatchEvent(new Event('input'))",
            query,
        )
        return self.shown()

    def press(self, key: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(key).perform()

    def until(self, condition: Callable[[], Any]) -> Any:
        end = time.monotonic() + 60
        while not (value := condition()):
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.05)
        return value


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    arguments = (
        "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1300,900"
    )
    for argument in [*arguments.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
    browser.get("about:blank")
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``many.html``, of five scans, and ``one.html``, of the first of them."""
    folder = tmp_path_factory.mktemp("pages")
    entries = [
        entry(NAMES[0], 50.0, 0.9),
        entry(NAMES[1], 9.5, 0.8, ("the vertex is outside the field of view",)),
        entry(NAMES[2], 100.0, 0.7),
        dataclasses.replace(entry(NAMES[3], 75.0), quality=None),
        failed_entry(NAMES[4], "/d/e.nii.gz: cannot be read"),
    ]
    write_html_report(folder / "many.html", entries, MANIFEST)
    write_html_report(folder / "one.html", entries[:1], MANIFEST)
    return folder


@pytest.fixture
def page(driver: Any, pages: Path, tmp_path: Path) -> Iterator[Page]:
    """Afterwards: the browser reported nothing, and asked for nothing but the file and its own pictures."""
    for path in pages.iterdir():
        shutil.copy(path, tmp_path)  # each test has a place of its own, by which the browser keeps verdicts
    for kind in ("browser", "performance"):
        driver.get_log(kind)
    yield Page(driver, tmp_path)
    assert driver.get_log("browser") == []
    asked = [json.loads(line["message"])["message"] for line in driver.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"}
    assert any(url.startswith("file:") for url in urls)
    urls = {url for url in urls if not url.startswith("chrome")}  # the browser's own first page
    outside = [url for url in urls if not url.startswith(("file:", "data:", "blob:", "about:"))]
    assert outside == []
    assert {url.split("/")[-1].split("#")[0] for url in urls if url.startswith("file:")} <= {"many.html", "one.html"}


def test_sorting_by_numbers_and_by_names(page: Page) -> None:
    assert page.shown() == [0, 1, 2, 3, 4]
    assert page.sort("Hippocampus") == "ascending"
    assert page.shown() == [1, 0, 3, 2, 4]  # 9.5, 50, 75, 100 as numbers; what is not known comes last
    assert page.sort("Hippocampus") == "descending"
    assert page.shown() == [2, 3, 0, 1, 4]
    page.sort("Scan")
    order = page.shown()
    assert [number for number in order if number in (0, 1, 2)] == [2, 0, 1]  # sub-1, sub-9, sub-10
    assert page.js("return document.querySelectorAll('[aria-sort]').length") == 1
    page.sort("Verdict")
    assert page.shown()[:2] == [4, 1]  # failed, then to look at
    page.sort("Predicted")
    assert page.shown() == [2, 1, 0, 3, 4]


def test_filtering(page: Page) -> None:
    assert page.look_for("SUB-1") == [1, 2]
    assert page.look_for("vertex outside") == [1]
    assert page.look_for("hippocampus < 60") == [0, 1]
    assert page.look_for("Hippocampus>=50 dice<0.8") == [2]
    assert page.look_for("no such scan") == []
    assert page.js("return document.querySelector('#nothing').offsetParent !== null")
    assert page.look_for("") == [0, 1, 2, 3, 4]
    page.click("#tools [data-state=failed]")
    assert page.shown() == [4]
    page.click("#tools [data-state=ok]")
    assert page.shown() == [0, 2]
    page.click("#tools [data-state=done]")
    assert page.shown() == [3]
    page.click("#tools [data-state=look]")
    assert page.shown() == [1]
    assert page.look_for("sub-9") == []
    page.click("#tools [data-state='']")
    assert page.shown() == [0]


def test_units(page: Page) -> None:
    def cells(number: int) -> list[str]:
        return page.js(
            "return [...document.querySelectorAll(`#row-${arguments[0]} td.volume`)].map(c => c.textContent)", number
        )

    def choose(unit: str) -> None:
        page.js("const u = document.querySelector('#unit'); u.value = arguments[0];"
                "u.dispatchEvent(new Event('change'))", unit)  # fmt: skip

    before = cells(1)
    hippocampus = 2 + 11  # after two totals and eleven structures
    assert (before[0], before[2], before[hippocampus]) == ("610", "600", "9.50")
    choose("soft")
    assert cells(1)[hippocampus] == "55.0"
    choose("percent")
    assert (cells(1)[0], cells(1)[hippocampus]) == ("100", "1.56")  # 9.5 of 609.5
    assert cells(4) == ["–"] * 18
    choose("hard")
    assert [cells(number) for number in range(5)] == [before if n == 1 else cells(n) for n in range(5)]
    assert cells(1) == before  # the script writes numbers as the page has them


def test_one_scan_enlarged(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    title = "return document.querySelector('dialog[open] .scan h2 bdi')?.textContent"
    assert page.js(title) is None
    page.click("#row-0 a.open")
    assert page.js(title) == "a.nii.gz"
    loaded = "return [...document.querySelectorAll('dialog .mosaic img')].map(i => i.complete ? i.naturalWidth : 0)"
    page.until(lambda: all(page.js(loaded)))
    grey, outlines = page.js(loaded)
    assert grey == outlines > 100
    visible = "return getComputedStyle(document.querySelector('dialog .outlines')).visibility"
    assert page.js(visible) == "visible"
    page.press("o")
    assert page.js(visible) == "hidden"
    page.press(Keys.ARROW_RIGHT)
    assert page.js(title) == "b.nii.gz"
    assert page.js(visible) == "hidden"  # as left
    assert "vertex" in page.js("return document.querySelector('dialog .flaglist').textContent")
    page.press("o")
    page.press(Keys.ARROW_LEFT)
    page.press(Keys.ARROW_LEFT)
    assert page.js(title) == "a.nii.gz"
    page.press(Keys.ESCAPE)
    page.until(lambda: page.js(title) is None)
    page.open("many", "#scan-3")
    assert page.js(title) == "c.nii.gz"
    assert len(page.driver.find_elements("css selector", "dialog .volumes tbody tr")) == 18


def test_the_arrows_follow_the_order_and_filter_of_the_table(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.sort("Hippocampus")
    page.look_for("hippocampus>20")
    page.click("#row-0 a.open")
    page.press(Keys.ARROW_RIGHT)
    assert "alert(1)" in page.js("return document.querySelector('dialog .scan').textContent")  # number 3, 75 ml
    assert page.js("return document.querySelector('dialog .place').textContent") == "2 of 3"


def test_verdicts_are_kept_and_saved(page: Page) -> None:
    page.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(page.folder / "saved")}
    )
    page.click("#row-1 a.open")
    page.until(lambda: page.js("return document.querySelector('dialog').open"))
    page.press("3")
    page.until(lambda: page.js("return document.querySelector('#row-1 .mine').textContent") == "✗ bad")
    page.js("const n = document.querySelector('dialog input'); n.value = 'cut off\\tabove';"
            "n.dispatchEvent(new Event('input'))")  # fmt: skip
    page.open("many")
    assert page.js("return document.querySelector('#row-1 .mine').textContent") == "✗ bad"
    page.click("#save")
    saved = page.folder / "saved" / "verdicts.tsv"
    page.until(saved.is_file)
    with open(saved, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows[0] == ["scan", "verdict", "note"]
    assert rows[1] == [NAMES[0], "n/a", "n/a"]
    assert rows[2] == [NAMES[1], "bad", "cut off above"]
    assert len(rows) == 6
    write_html_report(page.folder / "many.html", [entry(NAMES[1], 8.0), entry(NAMES[0])], MANIFEST)
    page.open("many")  # another result: the verdict was not on this one
    assert page.js("return document.querySelector('#row-0 .mine').textContent") == ""


def test_gallery_and_themes(page: Page) -> None:
    page.click("[data-view=gallery]")
    assert page.shown() == [0, 1, 2, 3, 4]
    left = page.js("return [...document.querySelectorAll('#table tbody tr')].map(r => r.getBoundingClientRect().left)")
    assert len(set(left)) > 1  # beside each other
    assert page.js("return document.querySelector('#row-0 td.volume').offsetParent") is None
    ground = "return getComputedStyle(document.body).backgroundColor"
    for scheme, color in (("dark", "rgb(20, 23, 27)"), ("light", "rgb(255, 255, 255)")):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        assert page.js(ground) == color
    page.click("#theme")
    assert page.js(ground) == "rgb(20, 23, 27)"


def test_a_single_scan_is_shown_at_once(page: Page) -> None:
    page.open("one")
    assert page.js("return document.querySelector('article.scan .mosaic img').naturalWidth") > 100
    visible = "return getComputedStyle(document.querySelector('.outlines')).visibility"
    assert page.js(visible) == "visible"
    page.press("o")
    assert page.js(visible) == "hidden"


@pytest.mark.parametrize("width", [1300, 390])
def test_nothing_is_wider_than_the_window(page: Page, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for name in ("many", "one"):
        page.open(name)
        assert page.js("return document.documentElement.scrollWidth") <= width
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
