"""A page that is really served, by a process of its own, and a real browser; both watched for requests to anywhere else."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlparse

import pytest
from safetensors.torch import save_file

from tests.conftest import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WATCHED = """
import os, sys
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        where = arguments[0] if event.startswith("socket.get") else arguments[-1]
        host = where[0] if isinstance(where, tuple) else where
        if isinstance(host, bytes): host = host.decode()
        if isinstance(where, str) and where.startswith("/"): return
        if host not in (None, "", "localhost", "127.0.0.1", "0.0.0.0", "::1", "::"):
            with open(os.environ["CALLS"], "a") as file: file.write(f"{event} {host}\\n")
sys.addaudithook(hook)
"""
PICTURE = dict(width=64, steps=3, num_images=1, seed=5)


def missing() -> str:
    """Why the page cannot be tested here; empty if it can."""
    if CHROMIUM is None:
        return "no chromium; apt-get install chromium"
    return next(
        (f"no {name}; pip install -r requirements-dev.txt" for name in ("gradio", "playwright") if not find_spec(name)),
        "",
    )


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """A page on the shipped model: its address, its folder, its process."""
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("page")
    (folder / "watch").mkdir()
    (folder / "watch" / "sitecustomize.py").write_text(WATCHED)
    env = os.environ | {
        "PYTHONPATH": f"{folder / 'watch'}:{ROOT}",
        "CALLS": str(folder / "calls"),
        "OMP_NUM_THREADS": "1",
    }
    (folder / "loras").mkdir()
    save_file({}, folder / "loras" / "gold.safetensors")
    places = {"lora": "loras", "out": "outputs", "train": "out", "log": "logs"}
    places = [f"--{name}_dir={folder / place}" for name, place in places.items()]
    log = open(folder / "said", "w")  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-m", "sd_hyena.ui", "--port", "0", "--device", "cpu", *places],
        cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    said = lambda: (folder / "said").read_text()
    try:
        until = time.monotonic() + 180
        while not (found := re.search(r"the page is at (http://\S+)", said())):
            assert process.poll() is None and time.monotonic() < until, said()
            time.sleep(0.1)
        yield SimpleNamespace(address=found[1], folder=folder, outputs=folder / "outputs", said=said)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        log.close()
    assert "Traceback" not in said() and code == 143, said()
    calls = folder / "calls"
    assert not calls.exists(), f"a request left the machine: {calls.read_text()}"


@pytest.fixture(scope="session")
def browser(served):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-renderer-backgrounding", "--disable-background-timer-throttling"],
        )
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, served):
    """Opens pages, the first as if nobody had been there; afterwards none has asked anybody else, or stumbled."""
    (served.outputs / ".page" / "last.yaml").unlink(missing_ok=True)
    pages, requests, errors = [], [], []
    asked, stumbled = lambda request: requests.append(request.url), lambda error: errors.append(str(error))

    def open_one(width: int = 1280):
        every = [page for context in browser.contexts for page in context.pages]
        free = [page for page in every if page not in pages]
        page = free[0] if free else browser.new_page()  # one that was used before has gradio's code at hand
        page.set_default_timeout(150_000)
        page.set_viewport_size({"width": width, "height": 900})
        page.on("request", asked)
        page.on("pageerror", stumbled)
        page.goto(served.address)
        page.wait_for_selector("#draw")
        page.wait_for_selector("body[data-opened=yes]")
        pages.append(page)
        return page

    yield open_one
    for page in pages:
        page.goto("about:blank")
        page.remove_listener("request", asked)
        page.remove_listener("pageerror", stumbled)
    assert not errors
    far = {
        url
        for url in requests
        if urlparse(url).scheme not in ("data", "blob") and urlparse(url).hostname != "127.0.0.1"
    }
    assert requests and not far


def fill(page, **options) -> None:
    """Fields of the form, by the options' names."""
    for name, value in options.items():
        page.locator(f"#draw-{name} :is(input, textarea)").first.fill(str(value))
    page.locator("#title").click()  # the last field is left


def choose(page, *values: str, **option: str) -> None:
    """Type and take these in the field of choices of an option."""
    ((name, value),) = option.items()
    for one in (value, *values):
        page.locator(f"#draw-{name} input").first.fill(one)
        page.keyboard.press("Enter")
    page.locator("#title").click()


def ended(page, state: str = "done", locator: str = "#stage"):
    """Wait for the job that a page follows."""
    from playwright.sync_api import TimeoutError as Late

    try:
        page.wait_for_selector(f"{locator} [data-state='{state}']", timeout=120_000)
    except Late:
        raise AssertionError(f"{locator} says {page.locator(locator).inner_text()!r}") from None


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def newest(folder: Path) -> Path:
    return max(folder.glob("*.png"), key=lambda path: path.stat().st_mtime_ns)
