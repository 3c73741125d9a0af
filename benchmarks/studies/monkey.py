"""python -m benchmarks.studies.monkey --minutes 30: who clicks at random on the page, and what becomes of its memory.

Up to three tabs; wrong and right sizes, draws, cancels, regions dragged, tabs closed and reloaded in the middle of drawing,
every button that is in sight but those that start a training. The server's resident memory is read every ten seconds; of the
time after --warm, which begins with a press of every button of every tab and in which the pages that are kept come to be as many
as ever, the last third's median is held to the first's. A traceback on the server ends it. Linux only.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

from benchmarks.harness.page import browser, served

TABS = ("Draw", "Regions", "Redraw", "Compare", "Distil")
LEFT_ALONE = ("#train-start", "#train-resume")
SIDES = (64, 64, 72, 96, 128, 0, 63, 100000)
GROWTH = 1.05


def buttons(page):
    """Those in sight that may be pressed."""
    return page.locator(f"button{''.join(f':not({one})' for one in LEFT_ALONE)}:visible")


def press_all(page) -> Counter:
    """Every button of every tab, once; how many were pressed, and how many could not be."""
    done = Counter()
    for name in TABS:
        page.get_by_role("tab", name=name, exact=True).click()
        page.wait_for_timeout(1000)
        for i in range(buttons(page).count()):
            try:
                buttons(page).nth(i).click(timeout=2000)
                page.wait_for_timeout(500)
                page.get_by_role("tab", name=name, exact=True).click(timeout=2000)
                done["pressed at first"] += 1
            except Exception as error:
                done[f"missed ({type(error).__name__})"] += 1
    return done


def act(page, source: random.Random) -> str:
    """One thing that a visitor might do; its name."""
    kind = source.choices(
        ("draw", "cancel", "size", "tab", "button", "drag", "keys", "reload", "number"), (6, 4, 5, 4, 5, 3, 2, 1, 3)
    )[0]
    if kind in ("draw", "cancel"):
        page.locator(f"#{kind}").click(timeout=2000)
    elif kind == "size":
        for name in ("width", "height"):
            field = page.locator(f"#draw-{name} input").first
            if field.is_visible():
                field.fill(str(source.choice(SIDES)), timeout=2000)
    elif kind == "number":
        for name, values in dict(steps=(1, 2, 3), num_images=(1, 2), seed=(-1, 5), cfg_scale=(0, 4)).items():
            field = page.locator(f"#draw-{name} input").first
            if field.is_visible():
                field.fill(str(source.choice(values)), timeout=2000)
    elif kind == "tab":
        page.get_by_role("tab", name=source.choice(TABS), exact=True).click(timeout=2000)
    elif kind == "button":
        found = buttons(page)
        found.nth(source.randrange(max(1, found.count()))).click(timeout=2000)
    elif kind == "drag":
        box = page.locator("#regions .stage, #painter canvas").first.bounding_box(timeout=1000)
        if box:
            at = lambda: (box["x"] + source.random() * box["width"], box["y"] + source.random() * box["height"])
            page.mouse.move(*at())
            page.mouse.down()
            page.mouse.move(*at(), steps=3)
            page.mouse.up()
    elif kind == "keys":
        for _ in range(4):
            page.keyboard.press(source.choice(("Tab", "Delete", "ArrowLeft", "ArrowDown", "Enter", "Escape")))
    else:
        page.reload(timeout=60_000)
    return kind


def main(given: argparse.Namespace) -> int:
    source, done, rows = random.Random(given.seed), Counter(), []
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as page, browser() as one:
        began, looked = time.monotonic(), 0.0
        pages: list = [one.new_page(viewport={"width": 1280, "height": 900})]
        pages[0].goto(page.address, timeout=120_000)
        pages[0].wait_for_selector("body[data-opened=yes]", timeout=120_000)
        done += press_all(pages[0])
        while (passed := time.monotonic() - began) < 60 * (given.warm + given.minutes) and "Traceback" not in page.said:
            if not pages or (len(pages) < 3 and source.random() < 0.05):
                pages.append(one.new_page(viewport={"width": source.choice((390, 1280)), "height": 900}))
                pages[-1].goto(page.address, timeout=120_000)
                done["tab opened"] += 1
            elif source.random() < 0.03:
                pages.pop(source.randrange(len(pages))).close()
                done["tab closed"] += 1
            else:
                try:
                    done[act(source.choice(pages), source)] += 1
                except Exception as error:  # what is not in sight cannot be clicked
                    done[f"missed ({type(error).__name__})"] += 1
            if passed - looked > 10:
                looked = passed
                rows.append(
                    (round(passed), round(page.resident_mib, 1), len(list((page.folder / "outputs").glob("*.png"))))
                )
                print("{} s, {} MiB, {} pictures".format(*rows[-1]), flush=True)
        for tab in pages:
            tab.close()
        said, alive = page.said, page.process.poll() is None
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with open(given.out, "w", newline="") as file:
        csv.writer(file).writerows([("second", "resident_MiB", "pictures"), *rows])
    print(", ".join(f"{name} {count}" for name, count in done.most_common()))
    measured = [row[1] for row in rows if row[0] >= 60 * given.warm]
    third = len(measured) // 3
    before, after = (median(part or [0.0]) for part in (measured[:third], measured[-third:] if third else []))
    growth = after / before if before else 1.0
    print(f"{rows[-1][0]} s, {rows[-1][2]} pictures, resident memory {before:.0f} -> {after:.0f} MiB ({growth:.3f})")
    faults = ["the server stumbled:\n" + said] * ("Traceback" in said) + ["the server went away"] * (not alive)
    faults += [f"memory grew by more than {GROWTH:.2f}"] * (growth > GROWTH)
    print("\n".join(faults) or "no traceback, no growth")
    return int(bool(faults))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm", type=float, default=10.0, help="minutes before that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/monkey.csv"))
    sys.exit(main(parser.parse_args()))
