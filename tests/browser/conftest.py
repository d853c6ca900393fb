"""A real browser (Chromium, driven by Playwright) before a real server; skipped, saying so, where one is missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]


@pytest.fixture(scope="module")
def chromium():
    """One browser for all tests of a file."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium (apt install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def screenshots() -> Path | None:
    """Folder for pictures to be looked at: set CLT_SCREENSHOTS."""
    folder = os.environ.get("CLT_SCREENSHOTS")
    if folder is None:
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


@pytest.fixture
def page(chromium):
    """A fresh page; any error in its log, and any request to elsewhere, fails the test."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))

    def is_local(url: str) -> bool:
        return url.startswith(("http://127.0.0.1:", "data:", "file:", "blob:"))

    page.on("request", lambda request: None if is_local(request.url) else problems.append(f"outside: {request.url}"))
    yield page
    context.close()
    assert problems == []
