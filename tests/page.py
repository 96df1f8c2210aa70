"""The page in a browser, end to end, over a scripted engine; `make page` runs these.

Needs playwright and a Chromium, found as `$CHROMIUM` or on the path. `$PAGE_SHOTS` names a folder
for screenshots.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from scripted import Scripted
from service import service

from moe_gguf.runtime.engine.request import Request
from moe_gguf.runtime.errors import RequestError

MARKDOWN = """# A heading

Some **bold**, *italic*, `code` and ~~old~~ text, [a link](https://example.org/a_(b)) and
https://example.org/bare. Not a link: [bad](javascript:alert(1)), a_b_c, 2 * 3 * 4.

1. one
2. two
   - inner **item**
   - another

> quoted

| a | b |
|---|--:|
| 1 | `x` |

```python
print("<b>" * 3)
```

---
"""
HOSTILE = """<script>document.title = "bad"</script> <img src=x onerror="document.title = 'bad'">
[x](data:text/html,x) [y](JaVaScRiPt:alert(1)) ![i](https://example.org/i.png)
[z](https://example.org/"onclick="alert(1)) <a href="javascript:alert(1)">a</a>
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    )
    assert program, "there is no Chromium: install one, or name it in $CHROMIUM"
    with sync_playwright() as playwright:
        # Its sandbox needs rights that root in a container lacks.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, engine: Scripted, key: str = "", **context: Any) -> Iterator[Page]:
    """The page of a server; nothing it does may be an error to the browser."""
    wrong: list[str] = []
    with service(engine, keys=(key,) if key else ()) as (_, url):
        found = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **context})
        page = found.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda m: wrong.append(m.text) if "Content Security" in m.text else None)
        page.goto(url)
        yield page
        found.close()
    assert wrong == []


def ask(page: Page, text: str = "Hi") -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def shoot(page: Page, name: str) -> None:
    if folder := os.environ.get("PAGE_SHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def saying(text: str, pause_s: float = 0.0) -> Scripted:
    return Scripted(lambda request: text.encode(), pause_s)


def test_an_answer_in_markdown(browser: Browser) -> None:
    with opened(browser, saying(MARKDOWN)) as page:
        ask(page)
        text = page.locator(".assistant .text")
        expect(text.locator("h3")).to_have_text("A heading")
        expect(text.locator("strong").first).to_have_text("bold")
        expect(text.locator("em")).to_have_text(["italic"])
        expect(text.locator("del")).to_have_text("old")
        addresses = [a.get_attribute("href") for a in text.locator("a").all()]
        assert addresses == ["https://example.org/a_(b)", "https://example.org/bare"]
        expect(text.locator("ol > li")).to_have_count(2)
        expect(text.locator("ol ul > li")).to_have_text(["inner item", "another"])
        expect(text.locator("blockquote")).to_have_text("quoted")
        expect(text.locator("td")).to_have_text(["1", "x"])
        expect(text.locator("pre")).to_have_text('print("<b>" * 3)')
        expect(text.locator("figcaption span")).to_have_text("python")
        expect(text.locator("hr")).to_have_count(1)
        expect(page.locator(".assistant small")).to_contain_text("per s")
        shoot(page, "markdown")


def test_what_a_model_writes_is_no_markup(browser: Browser) -> None:
    with opened(browser, saying(HOSTILE)) as page:
        ask(page, "<i>Hi</i>")
        text = page.locator(".assistant .text")
        expect(text).to_contain_text("<script>")
        expect(text.locator("script, img, i")).to_have_count(0)
        for one in text.locator("a").all():
            assert (one.get_attribute("href") or "").startswith("https://example.org/")
            assert one.get_attribute("onclick") is None
        expect(page.locator(".user")).to_have_text("<i>Hi</i>")
        assert page.title() != "bad"


def test_markdown_that_never_ends_is_quick(browser: Browser) -> None:
    """Patterns that go back again and again would stop the page."""
    hostile = "".join(
        f"{mark * 3000}\n\n" for mark in ("*a ", "`a ", "[a](", "~~a", "_a ", "> ", "| ")
    )
    with opened(browser, saying(hostile)) as page:
        start = time.monotonic()
        ask(page)
        expect(page.locator(".assistant small")).to_contain_text("per s", timeout=60_000)
        assert time.monotonic() - start < 30


def test_reasoning_is_folded(browser: Browser) -> None:
    with opened(browser, saying("<think>Let me **see**.</think>Done.")) as page:
        ask(page)
        expect(page.locator(".text")).to_have_text("Done.")
        expect(page.locator("summary")).to_contain_text("Reasoned")
        expect(page.locator(".thought")).not_to_be_visible()
        page.locator("summary").click()
        expect(page.locator(".thought strong")).to_have_text("see")


def test_stop_frees_the_sequence_and_again_answers_anew(browser: Browser) -> None:
    engine = saying("word " * 400, pause_s=0.01)
    with opened(browser, engine) as page:
        ask(page)
        expect(page.locator(".text")).to_contain_text("word")
        page.keyboard.press("Escape")
        expect(page.locator(".assistant small")).to_have_text("stopped")
        deadline = time.monotonic() + 5
        while engine.running and time.monotonic() < deadline:
            page.wait_for_timeout(50)
        assert not engine.running
        page.get_by_label("Regenerate").click()
        expect(page.locator(".assistant")).to_have_count(1)
        expect(page.get_by_label("Stop")).to_be_visible()
        page.get_by_label("Stop").click()
        expect(page.get_by_label("Send")).to_be_visible()
        prompts = [bytes(t for t in request.tokens if t < 256) for request in engine.requests]
        assert prompts[0] == prompts[1]  # without the answer that was stopped


def test_how_far_a_prompt_is(browser: Browser) -> None:
    with opened(browser, saying("Done.", pause_s=0.4)) as page:
        ask(page, "word " * 100)
        note = page.locator(".assistant small")
        expect(note).to_have_text("reading the prompt, 25 %")
        shoot(page, "prompt")
        expect(note).to_have_text("reading the prompt, 75 %")
        expect(note).to_contain_text("per s")


def test_the_schedule(browser: Browser) -> None:
    engine = saying("")
    engine.schedule = {
        **{"group": 8, "quantum": 16, "chunk": 64, "goal": "latency", "binds": "disk"},
        **{"disk_bytes_per_s": 1e9, "curve": [[1, 3.5], [8, 12.0]]},
    }
    with opened(browser, engine) as page:
        expect(page.locator("#schedule")).to_have_text(
            "8 at a time, in turns of 16 tokens; prompts in chunks of 64. The disk is the limit."
            " Expected tokens/s: 3.50 with 1, 12.0 with 8."
        )
        expect(page.locator("#goal")).to_have_text("for latency")
        page.locator("#schedule").scroll_into_view_if_needed()
        shoot(page, "schedule")


def test_settings_are_asked_for_and_remembered(browser: Browser) -> None:
    engine = saying("Yes.")
    with opened(browser, engine) as page:
        page.keyboard.press("Alt+s")
        page.get_by_label("System message").fill("Be brief.")
        page.get_by_label("Temperature").fill("0.25")
        page.get_by_label("Top-p").fill("0.5")
        page.get_by_label("Most tokens of an answer").fill("7")
        page.get_by_role("button", name="Done").click()
        ask(page)
        expect(page.locator(".text")).to_have_text("Yes.")
        page.reload()
        expect(page.locator(".text")).to_have_text("Yes.")  # of the conversation before
        ask(page, "And now?")
        expect(page.locator(".text")).to_have_count(2)
        expect(page.locator(".text").nth(1)).to_have_text("Yes.")
        for request in engine.requests:
            assert (request.sampling.temp, request.sampling.top_p) == (0.25, 0.5)
            assert request.max_tokens == 7
        told = bytes(token for token in engine.requests[1].tokens if token < 256).decode()
        assert told == "<system>Be brief.<user>Hi<assistant>Yes.<user>And now?<assistant>"
        page.keyboard.press("Alt+n")
        expect(page.locator("#turns > li")).to_have_count(0)


def test_failures_are_told(browser: Browser) -> None:
    def fails(request: Request) -> bytes:
        raise RequestError("the prompt is too long: shorten it")

    with opened(browser, Scripted(fails)) as page:
        ask(page)
        expect(page.get_by_role("alert")).to_have_text("the prompt is too long: shorten it")
        expect(page.get_by_label("Send")).to_be_enabled()


def test_a_connection_that_breaks_is_told(browser: Browser) -> None:
    def cut(route: Route) -> None:
        event = 'data: {"choices":[{"delta":{"content":"Half"}}]}\n\n'
        route.fulfill(content_type="text/event-stream", body=event)

    with opened(browser, saying("")) as page:
        page.route("**/v1/chat/completions", cut)
        ask(page)
        expect(page.get_by_role("alert")).to_contain_text("the connection ended")
        expect(page.locator(".text")).to_have_text("Half")


def test_a_key_is_asked_for_and_then_used(browser: Browser) -> None:
    with opened(browser, saying("Come in."), key="secret") as page:
        expect(page.locator("#state")).to_contain_text("API key")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Done").click()
        expect(page.locator("#state")).to_have_text("ready")
        ask(page)
        expect(page.locator(".text")).to_have_text("Come in.")


def test_the_map_is_told_to_eyes_and_to_keys(browser: Browser) -> None:
    with opened(browser, saying("")) as page:
        expect(page.locator("#held")).to_have_text("2 of 6 in memory")
        page.locator("#map").focus()
        page.keyboard.press("ArrowRight")
        expect(page.locator("#spot")).to_contain_text("layer 0, expert 0: in memory; used 0 times")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#spot")).to_contain_text("layer 1, expert 1: in memory; used 4 times")
        page.mouse.move(0, 0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_one_view_at_a_time(browser: Browser, scheme: str) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme, "has_touch": True}
    with opened(browser, saying(MARKDOWN), **phone) as page:
        ask(page)
        expect(page.locator("pre")).to_be_visible()
        expect(page.locator("#engine")).not_to_be_visible()
        shoot(page, f"phone-{scheme}")
        page.get_by_role("button", name="Engine", exact=True).tap()
        expect(page.locator("#map")).to_be_visible()
        expect(page.locator("#chat")).not_to_be_visible()
        shoot(page, f"phone-engine-{scheme}")
        for view in ("Chat", "Engine"):
            page.get_by_role("button", name=view, exact=True).tap()
            width = page.locator("html").evaluate("node => node.scrollWidth")
            assert width <= 360, "it must not scroll sideways"


def test_a_server_that_goes_and_comes_is_seen(browser: Browser) -> None:
    with opened(browser, saying("")) as page:
        expect(page.locator("#state")).to_have_text("ready")
        page.route(re.compile("/(stats|slots|experts)$"), lambda route: route.abort())
        expect(page.locator("#state")).to_have_text("the server does not answer")
        page.unroute_all()
        expect(page.locator("#state")).to_have_text("ready")
