"""Debian's Chromium, driven by Playwright: `with chromium() as browser: ...`. `reason_not_to()` says in words why there is none here."""
import contextlib
import os
import shutil
from collections.abc import Iterator

from debian import install
from playwright.sync_api import Browser, sync_playwright

PACKAGES = ("chromium", "fonts-dejavu-core")


def reason_not_to() -> str:
    """Why no browser can be started here, after trying to install it; empty where it can."""
    if shutil.which("chromium"):
        return ""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "chromium is not installed, and installing it needs root and apt-get"
    return install(*PACKAGES)


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
