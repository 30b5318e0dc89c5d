"""The page in headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


@contextmanager
def browser() -> Iterator[Any]:
    """A browser; skips where there is none."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip("there is no chromium on this machine; Debian's package is called so")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


class Page:
    """The page as a person uses it; whatever goes wrong in it is kept in `faults`.

    Args:
        context: A browser's context.
        link: The link that the server printed.
    """

    def __init__(self, context: Any, link: str) -> None:
        self.page = context.new_page()
        self.page.set_default_timeout(8000)
        self.faults: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", self._said)
        self.open(link)

    def _said(self, message: Any) -> None:
        refused = message.text.startswith("Failed to load resource")  # the page says these in words itself
        if message.type == "error" and not refused:
            self.faults.append(message.text)

    def open(self, link: str) -> None:
        """Go there, and wait until it is ready."""
        self.page.goto(link)
        self.ready()

    def ready(self) -> None:
        """Wait until the page can be used."""
        self.page.wait_for_selector("body[data-ready]")

    def set(self, **values: object) -> None:
        """Sampling, by the fields' names."""
        self.page.evaluate("document.getElementById('sampling').open = true")
        for label, value in values.items():
            self.page.get_by_label(label.replace("_", " "), exact=True).fill(str(value))
            self.page.keyboard.press("Tab")

    def send(self, text: str) -> None:
        """Say something, and wait for the reply."""
        self.page.fill("#message", text)
        self.page.press("#message", "Enter")
        self.settled()

    def settled(self) -> None:
        """Wait until nothing runs."""
        self.page.wait_for_selector("#send:visible")

    def replies(self) -> list[str]:
        """The replies that are shown."""
        found: list[str] = self.page.locator(".message.assistant .body").all_inner_texts()
        return found

    def made(self) -> list[str]:
        """What they were made with."""
        found: list[str] = self.page.locator(".message.assistant .made").all_inner_texts()
        return found

    def copied(self, name: str, number: int = -1) -> str:
        """What a reply's settings are when they are copied so."""
        message = self.page.locator(".message.assistant").nth(number)
        message.locator(".copies").evaluate("details => { details.open = true; }")
        self.page.evaluate("navigator.clipboard.writeText('')")
        message.get_by_role("button", name=f"Copy as {name}").click()
        self.page.wait_for_function("navigator.clipboard.readText().then((text) => text.length > 0)")
        return str(self.page.evaluate("navigator.clipboard.readText()"))

    def act(self, name: str, number: int = -1) -> None:
        """Press a button of a reply."""
        self.page.locator(".message.assistant").nth(number).get_by_role("button", name=name, exact=True).click()
        self.page.wait_for_timeout(50)
        self.settled()
