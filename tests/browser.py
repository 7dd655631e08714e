"""Debian's Chromium, driven by Playwright: `with chromium() as browser: ...`."""
import contextlib
import shutil
from collections.abc import Iterator

from playwright.sync_api import Browser, sync_playwright


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser of our own, with an empty profile; closed at the end, however the tests end."""
    with sync_playwright() as playwright:
        # without a sandbox, because tests run as root in a container; it opens only pages of this project
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
