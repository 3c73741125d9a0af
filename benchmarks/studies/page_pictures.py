"""python -m benchmarks.studies.page_pictures: the pictures of the page in docs/ui.md, made anew; minutes on a CPU.

Draws with and without students, with three regions, compares, and trains thirty steps, all on the shipped model. With
--all every tab is kept at both widths, light and dark, to be looked at; the documents hold a choice.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from benchmarks.harness.page import browser, served

WIDTHS = {"wide": 1280, "narrow": 390}
TABS = ("Draw", "Regions", "Redraw", "Compare", "Distil")
KEPT = tuple(f"{name.lower()}-wide-light" for name in TABS)
TOP = "window.scrollTo(0, 0); document.querySelector('#panel').scrollTop = 0"
PROMPT = "a red circle left of two blue squares on green stripes"
BOXES = (
    ((0.03, 0.05), (0.48, 0.6), "a red circle"),
    ((0.52, 0.05), (0.97, 0.6), "two blue squares"),
    ((0.03, 0.66), (0.97, 0.97), "stripes"),
)


def fill(page, prefix: str, **options) -> None:
    for name, value in options.items():
        page.locator(f"#{prefix}-{name} :is(input, textarea)").first.fill(str(value))
    page.locator("#title").click()


def tab(page, name: str) -> None:
    """Choose a tab, out of its menu where the screen is narrow."""
    if page.get_by_role("tab", name=name, exact=True).is_visible():
        page.get_by_role("tab", name=name, exact=True).click()
    else:
        page.locator(".overflow-menu button").first.click()
        page.locator(".overflow-dropdown").get_by_text(name, exact=True).click()
    page.wait_for_timeout(600)


def done(page) -> None:
    page.wait_for_selector("#stage [data-state=done]", timeout=600_000)
    page.wait_for_timeout(1500)


def prepare(page, side: int, steps: int) -> None:
    """Have something to show in each tab."""
    page.wait_for_selector("body[data-opened=yes]")
    fill(page, "draw", prompt=PROMPT, width=side, height=side, steps=steps, num_images=1, seed=7)
    page.locator("#draw").click()
    done(page)
    page.locator("#gallery img").first.click()
    page.wait_for_timeout(800)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="redraw it").click()
    page.wait_for_timeout(1500)
    tab(page, "Regions")
    page.get_by_role("button", name="picture below").click()
    page.wait_for_timeout(800)
    box = page.locator("#regions .stage").bounding_box()
    for start, end, _ in BOXES:
        at = lambda p: (box["x"] + p[0] * box["width"], box["y"] + p[1] * box["height"])
        page.mouse.move(*at(start))
        page.mouse.down()
        page.mouse.move(*at(end), steps=4)
        page.mouse.up()
    for i, (*_, prompt) in enumerate(BOXES):
        page.locator("#regions .list textarea").nth(2 * i).fill(prompt)
    page.locator("#title").click()
    tab(page, "Compare")
    page.locator("#compare-right input").first.fill("landmarks:64:IN01")
    page.keyboard.press("Enter")
    page.locator("#compare").click()
    page.wait_for_selector("#pair img.right", timeout=600_000)
    tab(page, "Distil")
    fill(page, "train", target="IN01", width=64, n_steps=30, batch_size=2, num_samples=2)
    page.locator("#buys").click()
    page.wait_for_selector("#answer table", timeout=600_000)
    page.locator("#train-start").click()
    page.wait_for_selector("#training [data-state=ended]", timeout=600_000)
    page.wait_for_timeout(3000)


def small(path: Path) -> None:
    """The picture in 128 colours."""
    with Image.open(path) as image:
        image.convert("RGB").quantize(128).save(path, optimize=True)


def main(given: argparse.Namespace) -> None:
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as server, browser() as one:
        page = one.new_page(viewport={"width": WIDTHS["wide"], "height": 860})
        page.set_default_timeout(600_000)
        page.goto(server.address)
        prepare(page, given.side, given.steps)
        for width, pixels in WIDTHS.items():
            page.set_viewport_size({"width": pixels, "height": 860})
            for mode in ("light", "dark"):
                page.evaluate("dark => document.body.classList.toggle('dark', dark)", mode == "dark")
                for name in TABS:
                    shown = f"{name.lower()}-{width}-{mode}"
                    if given.all or shown in KEPT:
                        page.evaluate(TOP)
                        tab(page, name)
                        page.wait_for_timeout(1000)  # a gallery scrolls to what is chosen in it, some frames later
                        page.evaluate(TOP)
                        if name == "Distil":  # what came of it
                            page.evaluate("document.querySelector('#train-start').scrollIntoView()")
                        page.wait_for_timeout(300)
                        path = given.out / f"ui-{shown}.png"
                        page.screenshot(path=path)
                        small(path)
                        print(path, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every tab at both widths, light and dark")
    parser.add_argument("--side", type=int, default=256, help="of the pictures, in pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    main(parser.parse_args())
