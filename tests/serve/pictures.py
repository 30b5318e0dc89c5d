"""Makes the pictures of docs/workbench.md: ``python -m tests.serve.pictures VECTORS...``, of the embedded model.

`make workbench-pictures` does all of it. A palette keeps each at a few dozen kilobytes; it is chosen so that colours of
few pixels, such as those of the legend and of marks, stay as they are, and then moved to those of many.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import persona_lens as pl
from persona_lens.serve.server import Running
from persona_lens.serve.shelf import Shelf
from persona_lens.serve.workbench import Workbench
from tests.serve.browsing import PHONE, Page, browser

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
COLOURS = 256
LAYERS = (14, 18, 22)
SHOWN = "optimistic@18"  # of what is steered


def kept(page: Any, name: str) -> None:
    """A picture, of few bytes."""
    picture = Image.open(io.BytesIO(page.screenshot()))
    file = FIGURES / f"workbench-{name}.png"
    picture.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=3).save(file, optimize=True)
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


def pictures(link: str) -> None:
    """What the pages of the documentation show."""
    with browser() as opened:
        context = opened.new_context(viewport={"width": 1200, "height": 860})
        page = Page(context, link)
        page.page.set_default_timeout(120_000)
        page.set(Tokens_at_most=60, Temperature=0.7, Seed=4)
        page.page.evaluate("document.getElementById('sampling').open = false")
        page.page.select_option("#gauge", SHOWN)
        page.send("I start a new job on Monday.")
        first = page.page.locator(".trait").first
        first.get_by_role("slider").fill("25")
        page.send("What will my colleagues be like?")
        page.page.locator(".token").nth(75).hover()
        kept(page.page, "chat")
        page.page.check("#compare")
        page.page.fill("#message", "How will my first week go?")
        page.page.press("#message", "Enter")
        page.page.wait_for_timeout(100)
        page.settled()
        page.page.mouse.move(5, 5)
        page.page.wait_for_timeout(200)
        page.page.emulate_media(color_scheme="dark")
        kept(page.page, "compare")
        page.page.emulate_media(color_scheme="light")
        page.page.set_viewport_size(PHONE)
        page.page.click("#show-rack")
        page.page.evaluate("document.documentElement.scrollTop = 0")
        kept(page.page, "phone")
        context.close()


def main(files: Sequence[str]) -> None:
    """Serve the embedded model with these vectors, and take the pictures."""
    backend = pl.open_backend("transformers", "smollm2-135m")
    shelf = Shelf(backend, [pl.load_vectors(file) for file in files], LAYERS)
    with Running(Workbench(backend, shelf)) as running:
        pictures(running.link)


if __name__ == "__main__":
    main(sys.argv[1:])
