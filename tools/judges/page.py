"""The page of `kbit serve` in headless Chromium: what a person does with it, by hand and by keyboard, wide and narrow.

    pip install playwright && apt-get install chromium        # or: playwright install chromium
    python tools/judges/page.py --screenshot docs/page.png

A server of its own serves the default model, and the same rounded to 4 bits. Every check prints a line; any that fails
ends it with exit code 1. --url takes a server that runs already (with two models), --chromium names the browser.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect, sync_playwright

MODELS = ["smollm2=smollm2-135m-instruct", "smollm2:4=smollm2-135m-instruct:4"]
QUESTION = "Why is the sky blue?"
PATIENCE = 300_000.0  # milliseconds, against hanging only


@contextmanager
def server() -> Iterator[str]:
    """The address of a new one."""
    command = [sys.executable, "-m", "kbit", "serve", *MODELS, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = ""
            while (found := re.search(r" at (http://\S+)", said)) is None:
                line = process.stderr.readline()
                if not line:
                    sys.exit(f"kbit serve ended: {said}")
                said += line
            yield found[1]
        finally:
            process.kill()


class Judge:
    """Prints checks and counts failures."""

    def __init__(self) -> None:
        self.failed = 0

    def check(self, what: str, good: bool, details: object = "") -> None:
        self.failed += not good
        print(f"{'ok    ' if good else 'FAILED'} {what}{'' if good else f': {details}'}", flush=True)


def answered(page: Page) -> None:
    """Waits for the end of an answer."""
    expect(page.locator("#status")).to_have_text("answered", timeout=PATIENCE)


def fits(page: Page) -> bool:
    """Whether nothing sticks out to the right."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def alone(page: Page, judge: Judge) -> None:
    """One model, by keyboard."""
    page.keyboard.type(QUESTION)  # the text field has the focus at the start
    page.keyboard.press("Enter")
    answered(page)
    said, meter = page.locator(".said").last, page.locator(".meter").last
    judge.check("an answer has text", len(said.inner_text().strip()) > 20, said.inner_text())
    judge.check("its speed is shown", re.search(r"\d tokens/s · \d+ tokens", meter.inner_text()) is not None)
    judge.check("memory is shown", "weights" in page.locator("#memory").inner_text())
    shown = "".join(said.locator("[data-token]").all_inner_texts())
    judge.check("every character belongs to a token", shown == said.evaluate("e => e.textContent"), shown)
    said.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    third = said.locator("[data-token]").nth(2)
    judge.check("the arrow keys reach a token", "here" in (third.get_attribute("class") or ""))
    check_tip(page, judge, "by keyboard")
    page.keyboard.press("Escape")
    judge.check("Escape closes it", page.locator("#tip").is_hidden())


def check_tip(page: Page, judge: Judge, how: str) -> None:
    """Log-probabilities are shown, and are ones: falling, of a token among them."""
    tip = page.locator("#tip")
    judge.check(f"log-probabilities appear {how}", tip.is_visible())
    rows = [line.split("\t") for line in tip.inner_text().splitlines()]
    values = [float(row[1]) for row in rows if len(row) == 3]
    judge.check(
        "five or six of them, falling", len(values) in (5, 6) and values[-5:] == sorted(values[-5:])[::-1], rows
    )


def pair(page: Page, judge: Judge) -> None:
    """Two models, by pointer."""
    page.get_by_label("beside").select_option(index=2)
    page.get_by_label("message", exact=True).fill("Give me three tips to sleep better.")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#status")).to_have_text("answering")
    judge.check("the button stops them", page.get_by_role("button", name="Stop").is_visible())
    answered(page)
    meters = page.locator(".pair .meter").all_inner_texts()
    judge.check("both have a speed", len(meters) == 2 and all("tokens/s" in meter for meter in meters), meters)
    both = page.locator(".pair .said").all_inner_texts()
    judge.check("two answers, and not the same", len(both) == 2 and both[0] != both[1] and all(both), both)
    names = page.locator(".pair .name").all_inner_texts()
    judge.check("named", len(set(names)) == 2, names)
    page.locator(".pair .said").first.locator("[data-token]").nth(4).hover()
    page.locator("#tip").wait_for()
    check_tip(page, judge, "under the pointer")


def stopped(page: Page, judge: Judge) -> None:
    """Escape ends an answer, and the next one works."""
    page.get_by_label("message", exact=True).fill("Write a very long story.")
    page.keyboard.press("Enter")
    page.locator(".meter").last.filter(has_text="tokens/s").wait_for(timeout=PATIENCE)
    page.keyboard.press("Escape")
    answered(page)
    page.get_by_role("button", name="New chat").click()
    judge.check("a new chat is empty", page.locator("main > *").count() == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--screenshot", type=Path, help="where to put a picture of the page")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser")
    arguments = parser.parse_args()
    judge = Judge()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.chromium)
        if arguments.url:
            judge_page(browser, arguments.url, judge, arguments.screenshot)
        else:
            with server() as url:
                judge_page(browser, url, judge, arguments.screenshot)
        browser.close()
    sys.exit(1 if judge.failed else 0)


def judge_page(browser: Any, url: str, judge: Judge, screenshot: Path | None) -> None:
    """All checks."""
    page = browser.new_page(viewport={"width": 1000, "height": 640})
    errors: list[str] = []
    elsewhere: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(url) else elsewhere.append(request.url))
    page.goto(url)
    page.locator("#memory").filter(has_text="weights").wait_for(timeout=PATIENCE)
    page.locator("summary").click()
    page.get_by_label("seed").fill("2")
    page.get_by_label("most tokens").fill("160")
    page.keyboard.press("Escape")
    page.get_by_label("message", exact=True).focus()
    alone(page, judge)
    pair(page, judge)
    judge.check("nothing sticks out at 1000 pixels", fits(page))
    if screenshot is not None:
        page.screenshot(path=screenshot)
    page.set_viewport_size({"width": 360, "height": 640})
    judge.check("nothing sticks out at 360 pixels", fits(page))
    left, right = (box.bounding_box() for box in page.locator(".pair .assistant").all())
    judge.check("there, answers stand one below the other", right["y"] >= left["y"] + left["height"])
    stopped(page, judge)
    before = list(errors)
    ran = page.evaluate(
        "() => { const script = document.createElement('script'); script.textContent = 'window.ran = true';"
        " document.body.append(script); return Boolean(window.ran); }"
    )
    judge.check("the policy forbids other scripts", not ran)
    errors = [error for error in before if "favicon" not in error]
    judge.check("no errors in the console", not errors, errors)
    judge.check("nothing was fetched from elsewhere", not elsewhere, elsewhere)


if __name__ == "__main__":
    main()
