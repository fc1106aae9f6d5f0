"""The README's picture: two panels of the report of ``make demo``, drawn by whatever Chromium there is.

Run as ``make picture``, after ``make demo``.
"""

import base64
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from browser import Browser, installed  # noqa: E402 - stands among the tests, which open the page with it too

WIDTH, HEIGHT, TALL = 1280, 900, 1300


def main() -> None:
    """Draw ``docs/report.png``."""
    report = ROOT / "artifacts/demo/report.html"
    if not report.is_file():
        sys.exit(f"{report}: there is no report. Type make demo first.")
    if not installed():
        sys.exit(
            "there is no Chromium. Install one, or name it in the environment variable CHROMIUM."
        )
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        Browser(Path(folder)) as page,
    ):
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=WIDTH,
            height=HEIGHT,
            deviceScaleFactor=1,
            mobile=False,
        )
        page.open(report)
        top = page.ask("document.querySelector('#group').getBoundingClientRect().top")
        clip = {"x": 40, "y": top - 20, "width": WIDTH - 100, "height": TALL, "scale": 0.8}
        picture = page.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip
        )["data"]
    (ROOT / "docs/report.png").write_bytes(base64.b64decode(picture))


if __name__ == "__main__":
    main()
