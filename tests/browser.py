"""The book as a reader's browser sees it: one strict build that all tests share, a server, and visits to its pages."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock
from notebook_rules import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def build(out, root=ROOT):
    """Render the book under `root` strictly into `out`, every warning an error; returns the folder of its pages."""
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    strictly = ["--all", "--warningiserror", "--keep-going", "--quiet"]
    command = [jupyter_book, "build", ".", *strictly, "--path-output", out]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out / "_build" / "html"


@pytest.fixture(scope="session")
def html(tmp_path_factory, worker_id):
    """The folder of a fresh, strict build, which parallel test processes share."""
    if worker_id == "master":
        return build(tmp_path_factory.mktemp("book"))
    shared = tmp_path_factory.getbasetemp().parent / "book"
    with FileLock(f"{shared}.lock"):
        pages = shared / "_build" / "html"
        return pages if (pages / "index.html").is_file() else build(shared)


@pytest.fixture(scope="session")
def address(html):
    """The book on a plain file server."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=html))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        if os.environ.get("NOTHING_SKIPPED"):
            pytest.fail("NOTHING_SKIPPED is set and no Chromium is installed")
        pytest.skip("no Chromium here; the page checks need one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """A page that was opened, with what it asked for and complained of."""

    def __init__(self, browser, url, width=1280, theme="light"):
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        self.requests, self.faults = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("requestfailed", lambda request: self.faults.append(f"failed: {request.url}"))
        self.page.on("console", lambda message: message.type == "error" and self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(url, wait_until="networkidle")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.page.close()

    def typeset(self):
        """The number of formulas on the page."""
        return self.page.locator("article math").count()

    def elsewhere(self, *own):
        return [url for url in self.requests if not url.startswith((*own, "data:", "blob:"))]
