"""Makes the pictures of docs/workbench.md: ``python -m tests.serve.pictures LINK`` of a server with the embedded model.

`make workbench-pictures` does all of it. The palette of 64 colours keeps each at a few dozen kilobytes.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from tests.serve.browsing import PHONE, Page, browser

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
COLOURS = 64


def kept(page: Any, name: str, folder: Path) -> None:
    """A picture, light."""
    picture = Image.open(io.BytesIO(page.screenshot()))
    file = folder / f"workbench-{name}.png"
    picture.convert("RGB").quantize(COLOURS).save(file, optimize=True)
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


def pictures(link: str, folder: Path = FIGURES) -> None:
    """What the pages of the documentation show."""
    with browser() as opened:
        context = opened.new_context(viewport={"width": 1200, "height": 860})
        page = Page(context, link)
        page.page.set_default_timeout(120_000)
        page.set(Tokens_at_most=60, Temperature=0.7, Seed=4)
        page.page.evaluate("document.getElementById('sampling').open = false")
        page.send("I start a new job on Monday.")
        first = page.page.locator(".trait").first
        first.get_by_role("slider").fill("25")
        page.send("What will my colleagues be like?")
        page.page.locator(".token").nth(75).hover()
        kept(page.page, "chat", folder)
        page.page.check("#compare")
        page.page.fill("#message", "How will my first week go?")
        page.page.press("#message", "Enter")
        page.page.wait_for_timeout(100)
        page.settled()
        page.page.mouse.move(5, 5)
        page.page.wait_for_timeout(200)
        page.page.emulate_media(color_scheme="dark")
        kept(page.page, "compare", folder)
        page.page.emulate_media(color_scheme="light")
        page.page.set_viewport_size(PHONE)
        page.page.click("#show-rack")
        page.page.evaluate("document.documentElement.scrollTop = 0")
        kept(page.page, "phone", folder)
        context.close()


if __name__ == "__main__":
    pictures(sys.argv[1], *map(Path, sys.argv[2:]))
