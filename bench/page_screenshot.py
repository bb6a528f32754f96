"""Write docs/serving-page.png: the page of ``bt-adapter serve`` with a question about a demo clip, in a real browser.

``python bench/page_screenshot.py`` starts a server with the small stack on a free port, asks with and without the
branch, and ends the server. It needs the extra [page], playwright, and a Chromium (the environment variable CHROMIUM,
default /usr/bin/chromium).
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from bt_adapter.files import write_bytes

OUT = Path(__file__).resolve().parents[1] / "docs" / "serving-page.png"
SECONDS = 300
EXAMPLE = "a white boot moving left"


@contextmanager
def serving() -> Iterator[str]:
    """Run the command within the context; yields the page's address."""
    command = [sys.executable, "-m", "bt_adapter.commands", "serve", "--page", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if found := re.search(r"a page at (http://\S+)", line):
                    yield found[1]
                    return
            raise SystemExit("the server ended before it was ready")
        finally:
            process.terminate()


def ask(page: Page) -> None:
    """Ask about an example with and without the branch, and wait for both answers."""
    page.locator("#examples").get_by_text(EXAMPLE).click()
    expect(page.locator("#video video")).to_be_visible()
    page.get_by_label("Compare with the branch switched off").check()
    page.locator("#question-ask").click()
    for column in range(2):
        expect(page.locator(f"#line-{column} textarea")).to_have_value(re.compile("tokens in"))
    expect(page.locator("#gallery img")).to_have_count(8)
    page.wait_for_function("[...document.images].every(image => image.complete)")


def main() -> None:
    """Write the screenshot."""
    expect.set_options(timeout=SECONDS * 1000)
    with serving() as url, sync_playwright() as player:
        browser = player.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 1090})
        page.set_default_timeout(SECONDS * 1000)
        page.goto(url)
        ask(page)
        picture = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    small = io.BytesIO()
    picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(small, "PNG", optimize=True)
    write_bytes(OUT, small.getvalue())
    print(f"{OUT.name}: {len(small.getvalue()):,} bytes, {picture.width} x {picture.height}")


if __name__ == "__main__":
    main()
