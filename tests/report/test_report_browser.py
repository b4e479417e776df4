"""The report in a real browser: every figure has a size, nothing is requested or complained of,
and both themes are told apart.
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deepspec.report.report import report_text
from tests.conftest import tiny_run
from tests.evaluate.made_results import made_calibration, made_rows, made_scheduler, put_result

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs a browser: `apt-get install chromium`"
)
# allows no script, and so no probe either
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
PROBE = """
<script>
addEventListener("load", () => {
  const luminance = colour =>
    colour.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 765;
  const sizes = selector =>
    [...document.querySelectorAll(selector)]
      .map(it => it.getBoundingClientRect())
      .map(it => [it.width, it.height]);
  document.documentElement.dataset.probe = JSON.stringify({
    figures: sizes("figure svg"),
    strokes: sizes("figure path[style*='stroke-width: 1.8']"),
    tables: sizes("table"),
    paper: luminance(getComputedStyle(document.body).backgroundColor),
    ink: luminance(getComputedStyle(document.body).color),
    text: luminance(getComputedStyle(document.querySelector("figure text")).fill),
    requests: performance.getEntriesByType("resource").map(entry => entry.name),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  });
});
</script></body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two runs with everything in it."""
    folder = tmp_path_factory.mktemp("report")
    more = {"calibration": made_calibration(), "scheduler": made_scheduler()}
    one = put_result(tiny_run(folder / "a"), made_rows(prompts=6, batch_sizes=[1, 4]), more=more)
    two = put_result(
        tiny_run(folder / "b", "draft.num_layers=1"),
        made_rows(prompts=6, batch_sizes=[1, 4], better=0.05),
        more=more,
    )
    (folder / "report.html").write_text(report_text([one, two], "html"), encoding="utf-8")
    return folder / "report.html"


def browse(path: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The page loaded, its document on stdout and the browser's log on stderr."""
    common = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={profile}",
        "--enable-logging=stderr",
        "--v=0",
    ]
    command = [str(CHROMIUM), *common, *flags, "--dump-dom", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def probed(page: Path, folder: Path, *flags: str) -> dict[str, Any]:
    """What a script in the page sees of it."""
    copy = folder / "probed.html"
    copy.write_text(POLICY.sub("", page.read_text()).replace("</body>", PROBE), encoding="utf-8")
    found = re.search(r'data-probe="([^"]*)"', browse(copy, folder / "profile", *flags).stdout)
    assert found, "the page came to its end"
    return dict(json.loads(html.unescape(found[1])))


def test_the_browser_has_nothing_to_complain_of(page: Path, tmp_path: Path):
    assert "CONSOLE" not in browse(page, tmp_path).stderr
    broken = tmp_path / "broken.html"
    broken.write_text(
        page.read_text().replace("</body>", '<img src="https://example.com/x.png"></body>')
    )
    assert "CONSOLE" in browse(broken, tmp_path).stderr, "it would have said so"


def test_every_figure_is_there_and_nothing_is_requested(page: Path, tmp_path: Path):
    seen = probed(
        page, tmp_path, "--blink-settings=preferredColorScheme=1", "--window-size=1200,900"
    )
    assert len(seen["figures"]) == page.read_text().count("<figure>") > 30
    assert all(width > 250 and height > 100 for width, height in seen["figures"])
    assert len(seen["strokes"]) > 100
    assert all(width > 1 or height > 1 for width, height in seen["strokes"])
    assert all(width > 100 and height > 30 for width, height in seen["tables"])
    assert seen["requests"] == []
    assert seen["paper"] > 0.9 and seen["ink"] < 0.2 and seen["text"] < 0.5


def test_it_is_dark_where_the_reader_wants_it_and_fits_a_narrow_window(page: Path, tmp_path: Path):
    seen = probed(
        page, tmp_path, "--blink-settings=preferredColorScheme=0", "--window-size=500,900"
    )
    assert seen["paper"] < 0.2 and seen["ink"] > 0.8 and seen["text"] > 0.5
    assert seen["overflow"] <= 0, "wide tables scroll by themselves"
