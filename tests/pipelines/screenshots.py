"""Takes the screenshots of docs/report.md: python tests/pipelines/screenshots.py PAGE FOLDER."""

import sys
from pathlib import Path

from browser import Browser

SHOWN = "document.querySelectorAll('.detail article.answer').length"


def main(page: Path, folder: Path) -> None:
    """Take screenshots of the first screen on a desktop and on a phone, and of the pair with the largest margin."""
    browser = Browser()
    try:
        browser.resize(1440, 900)
        browser.open(page.as_uri())
        browser.screenshot(folder / "report-words.png")
        browser.run("document.getElementById('largest-margin').click()")
        browser.wait(SHOWN)
        browser.run("document.querySelector('.detail article.answer button').click()")
        browser.wait("document.querySelectorAll('.detail .token').length")
        browser.screenshot(folder / "report-samples.png")
        browser.resize(390, 844, dark=True)
        browser.open(page.as_uri())
        browser.screenshot(folder / "report-phone.png")
        assert browser.complaints() == []
    finally:
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]))
