"""The chat page in a real browser, over a server with a model that says what the test wrote for it."""

import re
import shutil
import threading

import pytest
from helpers import byte_tokenizer, random_model, serving, small_config

from nanochat.api import Settings
from nanochat.engine import Engine
from nanochat.engine_worker import EngineWorker

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

TOKENIZER = byte_tokenizer()
SPECIAL = TOKENIZER.special
QUIET = [  # what a browser asks of the network by itself
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
    "--no-first-run", "--disable-gpu", "--no-sandbox",
]  # fmt: skip
HOSTILE = (
    "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'><svg/onload=window.hit=1>"
    "[a](javascript:window.hit=1) [b](data:text/html,x) **<b onclick='window.hit=1'>bold</b>** "
    '`<i>code</i>` [c](https://example.com/"onclick="window.hit=1) https://example.com/<u>\n\n'
    "```<script>\n</code></pre><script>window.hit = 1</script>\n```\n\n| <b>a</b> | b |\n|---|---|\n| <script> | 2 |"
)
MARKDOWN = """# Title

Some *slanted* and **strong** text, `code`, 2*3*4 and a [link](https://example.com/a).

- one
  - inner
- two

1. first
2. second

> quoted

```python
print("<hi>")
```

| a | b |
|---|---|
| 1 | 2 |"""


def ids(text):
    return TOKENIZER.encode(text)


SCRIPTS = {
    "hostile": ids(HOSTILE),
    "markdown": ids(MARKDOWN),
    "sum": [*ids("It is "), SPECIAL["<|python_start|>"], *ids("2+3"), SPECIAL["<|python_end|>"]],
    "long": ids("word " * 200),
    "endless": ids("word " * 300),
    "nothing": [],
}


class ScriptedEngine(Engine):
    """Says what the script has for the last question, else that question again; a pause before each step, where one is
    asked for. Everything but the choice of tokens is the engine's own."""

    pause = 0.0
    gate = threading.Event()

    def step(self):
        self.gate.wait(30)
        threading.Event().wait(self.pause)
        return super().step()

    def _choose(self, rows, logits, groups):
        chosen = []
        for row in rows:
            start = len(row.request.prompt) - row.request.prompt[::-1].index(SPECIAL["<|user_start|>"])
            question = TOKENIZER.decode([id for id in row.request.prompt[start:] if id < 256])
            script = SCRIPTS.get(question.split()[-1], ids(f"So: {question}"))
            if row.request.prefix and row.count < len(row.request.prefix) + 3:
                chosen.append(ord("+"))  # after another token it says something else
            elif row.request.prefix or row.count >= len(script) + len(ids("5")) + 2 * ("sum" in question):
                chosen.append(SPECIAL["<|assistant_end|>"])
            else:
                chosen.append(script[row.count] if row.count < len(script) else SPECIAL["<|assistant_end|>"])
        return chosen


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server():
    model = random_model(small_config(TOKENIZER.vocab_size, sequence_len=1024), seed=5)
    engine = ScriptedEngine(model, TOKENIZER, max_rows=8)
    engine.gate.set()
    options = {"model_name": "tiny · sft · step 7", "defaults": Settings(max_tokens=400)}
    with serving([EngineWorker(engine, capacity=2)], TOKENIZER, 1024, **options) as (address, _):
        yield address, engine


@pytest.fixture
def context(browser, server):
    server[1].pause = 0.0
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    context.set_default_timeout(15_000)
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server[0])
    yield context
    context.close()


@pytest.fixture
def page(context, server):
    page = open_page(context, server[0])
    yield page
    assert page.problems == [], "what the browser complained of"


def open_page(context, address):
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
    page.on("request", lambda request: request.url.startswith((address, "data:")) or page.problems.append(request.url))
    page.goto(address)
    sync_api.expect(page.locator("#model")).to_have_text("tiny · sft · step 7")
    return page


def send(page, text):
    page.fill("#input", text)
    page.press("#input", "Enter")


def settle(page):
    sync_api.expect(page.locator("#turns")).to_have_attribute("aria-busy", "false", timeout=20_000)


def ask(page, text):
    send(page, text)
    settle(page)


def answers(page):
    return page.locator(".assistant .body").all_inner_texts()


def questions(page):
    return page.locator(".user .body").all_inner_texts()


def button(page, name, of=".turn", nth=-1):
    return page.locator(of).nth(nth).get_by_role("button", name=name, exact=True)


def test_a_conversation_of_three_turns_is_kept_over_a_reload(page):
    for text in ("one", "two", "three"):
        ask(page, text)
    assert questions(page) == ["one", "two", "three"]
    assert answers(page) == ["So: one", "So: two", "So: three"]
    assert page.locator(".rate").last.inner_text() == "9 tokens"
    page.reload()
    page.locator(".assistant").nth(2).wait_for()
    assert answers(page) == ["So: one", "So: two", "So: three"]
    ask(page, "four")
    assert answers(page)[-1] == "So: four"


def test_an_answer_is_seen_while_it_is_written_and_stops_when_told_to(page, server):
    server[1].pause = 0.01
    send(page, "long")
    sync_api.expect(page.locator(".writing .body")).to_contain_text("word " * 12)
    page.keyboard.press("Escape")
    settle(page)
    said = answers(page)[0]
    assert said.startswith("word word") and len(said) < 900
    assert page.locator(".note:visible").inner_text() == "Stopped."
    assert re.fullmatch(r"\d+ tokens · \d+ tokens/s", page.locator(".rate").inner_text())
    server[1].pause = 0.0
    ask(page, "next")
    assert answers(page)[1] == "So: next"
    server[1].pause = 0.01
    send(page, "long again long")
    page.locator(".writing").wait_for()
    page.click("#stop")
    settle(page)
    server[1].pause = 0.0


def test_a_question_is_edited_and_the_older_one_stays(page):
    ask(page, "one")
    ask(page, "two")
    page.locator(".user").first.hover()
    button(page, "Edit", ".user", 0).click()
    box = page.get_by_label("Edit the message")
    assert box.input_value() == "one"
    box.fill("uno")
    box.press("Enter")
    settle(page)
    assert (questions(page), answers(page)) == (["uno"], ["So: uno"])
    page.locator(".user").first.hover()
    button(page, "The one before", ".user", 0).click()
    assert (questions(page), answers(page)) == (["one", "two"], ["So: one", "So: two"])
    page.reload()
    page.locator(".assistant").nth(1).wait_for()
    assert questions(page) == ["one", "two"], "what was shown last is shown again"
    page.press("#input", "ArrowUp")
    sync_api.expect(page.get_by_label("Edit the message")).to_be_focused()
    page.keyboard.press("Escape")
    assert questions(page) == ["one", "two"]


def test_an_answer_is_regenerated_and_the_older_one_stays(page):
    ask(page, "one")
    button(page, "Regenerate").click()
    settle(page)
    assert page.locator(".assistant").count() == 1 and "2/2" in page.locator(".assistant .actions").inner_text()
    ask(page, "two")
    assert questions(page) == ["one", "two"]
    page.locator(".assistant").first.hover()
    button(page, "The one before", ".assistant", 0).click()
    assert questions(page) == ["one"], "the other answer was not gone on from"


def test_copying_gives_the_text_as_it_was_written(page):
    ask(page, "markdown")
    button(page, "Copy", ".assistant > .actions", 0).click()
    sync_api.expect(page.locator("#status")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == MARKDOWN


def test_markdown_becomes_elements(page):
    ask(page, "markdown")
    body = page.locator(".assistant .body")
    for selector, text in {
        "h3": "Title", "em": "slanted", "strong": "strong", "p > code": "code", "ul ul li": "inner",
        "ol li:nth-child(2)": "second", "blockquote": "quoted", "pre": 'print("<hi>")', ".code .head": "python",
        "th:nth-child(2)": "b", "td:nth-child(1)": "1", "a": "link",
    }.items():  # fmt: skip
        assert body.locator(selector).inner_text().strip() == text, selector
    assert "2*3*4" in body.inner_text()
    assert body.locator("a").get_attribute("href") == "https://example.com/a"
    assert "noopener" in body.locator("a").get_attribute("rel")


@pytest.mark.parametrize("microscope", [False, True])
def test_hostile_text_stays_text(page, microscope):
    if microscope:
        page.click("#microscope")
    ask(page, "hostile")
    if not microscope:
        text = page.locator(".assistant .body").inner_text()
        assert "<script>window.hit = 1</script>" in text and "onerror='window.hit = 1'" in text
        assert "</code></pre><script>window.hit = 1</script>" in page.locator(".code pre").inner_text()
        links = page.locator(".assistant .body a").evaluate_all("links => links.map(link => link.href)")
        assert all(link.startswith("https://example.com/") for link in links) and len(links) == 2
    ask(page, HOSTILE)
    allowed = {
        "a", "blockquote", "br", "button", "code", "div", "del", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p",
        "path", "pre", "span", "strong", "svg", "table", "tbody", "td", "th", "thead", "tr", "ul", "article",
    }  # fmt: skip
    used = page.locator("#turns *").evaluate_all("nodes => [...new Set(nodes.map(node => node.localName))]")
    assert set(used) <= allowed
    handlers = "nodes => nodes.flatMap(n => [...n.attributes]).filter(a => a.name.startsWith('on')).length"
    assert page.locator("#turns *").evaluate_all(handlers) == 0
    assert page.evaluate("window.hit") is None
    title = page.locator("#conversations a").first
    assert title.inner_text() == "hostile"


def test_calls_of_tools_are_boxes_in_the_text(page):
    ask(page, "sum")
    box = page.locator(".tool")
    assert box.locator("code").inner_text() == "2+3" and box.locator(".result").inner_text() == "5"
    assert answers(page)[0].startswith("It is")


def test_two_tabs_at_once_keep_their_own_and_see_each_other(context, server):
    first, second = open_page(context, server[0]), open_page(context, server[0])
    server[1].pause = 0.005
    send(first, "long")
    send(second, "in the other tab")
    settle(second)
    assert answers(second) == ["So: in the other tab"]
    settle(first)
    assert answers(first) == [("word " * 80).strip()], "cut off at 400 tokens"
    server[1].pause = 0.0
    sync_api.expect(second.locator("#conversations li")).to_have_count(2)
    second.get_by_role("link", name="long").click()
    sync_api.expect(second.locator(".assistant .body")).to_contain_text("word word")
    ask(first, "and now")
    sync_api.expect(second.locator(".assistant .body").last).to_have_text("So: and now")
    assert first.problems == second.problems == []


def test_the_microscope_shows_tokens_and_goes_on_from_another(page):
    ask(page, "sum")
    page.click("#microscope")
    tokens = page.locator("#turns .token")
    texts = tokens.all_inner_texts()
    assert texts[:6] == ["I", "t", "·", "i", "s", "·"]
    assert texts[6:] == [
        "python_start",
        "2",
        "+",
        "3",
        "python_end",
        "output_start",
        "5",
        "output_end",
        "assistant_end",
    ]
    assert page.locator("#turns .token.forced").all_inner_texts() == ["output_start", "5", "output_end"]
    tokens.nth(1).click()
    panel = page.get_by_role("region", name="Token")
    assert f"id {ord('t')}" in panel.inner_text() and "token 2 of 15" in panel.inner_text()
    shares = panel.locator(".share").all_inner_texts()
    assert len(shares) == 9 and all(re.fullmatch(r"[<>]?[\d.]+ %", share) for share in shares)
    tokens.nth(12).click()
    assert "Put in by the tool" in panel.inner_text()
    page.keyboard.press("ArrowLeft")
    assert "output_start" in panel.inner_text() and "token 12 of 15" in panel.inner_text()
    page.keyboard.press("Escape")
    assert not panel.is_visible()
    tokens.nth(1).click()
    other = panel.locator("button[aria-label^='Go on from']").first
    chosen = other.locator("code").inner_text()
    other.click()
    settle(page)
    texts = page.locator("#turns .token").all_inner_texts()
    assert texts[:2] == ["I", chosen] and texts[2:] == ["+", "+", "+", "assistant_end"]
    assert page.locator("#turns .token.chosen").all_inner_texts() == [chosen]
    assert "2/2" in page.locator(".assistant .actions").inner_text()
    page.click("#microscope")
    assert page.locator(".assistant .body").inner_text().endswith("+++")
    button(page, "The one before", ".assistant").click()
    assert page.locator(".tool .result").inner_text() == "5", "the first answer is still there"


def test_going_on_from_another_token_again_and_again(page, server):
    """The microscope is on while the answers are written, and the panel closes as the answer changes."""
    page.click("#microscope")
    server[1].pause = 0.01
    ask(page, "hello there")
    for turn in range(2, 5):
        page.locator("#turns .token").nth(turn).click()
        page.get_by_role("region", name="Token").locator("button[aria-label^='Go on from']").first.click()
        sync_api.expect(page.locator(".assistant .actions")).to_contain_text(f"{turn}/{turn}")
        assert page.locator("#turns .token.chosen").count() == turn - 1
    server[1].pause = 0.0
    sync_api.expect(page.locator("#turns .token.chosen").last).to_be_focused()
    page.locator("#turns .token").first.click()
    page.keyboard.press("End")
    assert "ended its turn" in page.get_by_role("region", name="Token").inner_text()
    token, panel = (page.locator(each).bounding_box() for each in ("#turns .token[aria-expanded=true]", ".panel"))
    assert panel["y"] >= token["y"] + token["height"] - 1, "what is looked at can be seen"


def test_an_answer_cut_off_goes_on_where_it_was(page):
    ask(page, "/max")  # no command of that name
    assert "not a command" in page.locator(".remark").inner_text()
    page.click("#open-settings")
    page.fill("#max_tokens", "7")
    page.get_by_role("button", name="Done").click()
    ask(page, "cut me")
    assert answers(page) == ["So: cut"] and "Cut off" in page.locator(".note:visible").inner_text()
    button(page, "Go on").click()
    settle(page)
    assert answers(page) == ["So: cut+++"] and page.locator(".assistant").count() == 1


def test_settings_and_commands_reach_the_model(page, server):
    seen = []
    page.on("request", lambda request: seen.append(request.post_data_json) if request.method == "POST" else None)
    ask(page, "/temperature 1.5")
    assert page.locator(".remark").inner_text() == "Temperature is now 1.5."
    ask(page, "/topk 7")
    ask(page, "/temperature 9")
    assert "from 0 to 2" in page.locator(".remark").inner_text()
    ask(page, "/help")
    for name in ("/temperature", "/topk", "/clear", "/help"):
        assert name in page.locator(".remark").inner_text()
    page.click("#open-settings")
    page.fill("#system", "Be kind.")
    page.fill("#seed", "11")
    page.get_by_role("button", name="Done").click()
    ask(page, "hello")
    asked = seen[-1]
    assert (asked["temperature"], asked["top_k"], asked["seed"]) == (1.5, 7, 11)
    assert asked["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]
    ask(page, "/clear")
    assert questions(page) == [] and page.locator("#welcome").is_visible()
    assert page.locator("#conversations li").count() == 1, "it is put aside, not lost"
    page.reload()
    ask(page, "again")
    assert seen[-1]["temperature"] == 1.5, "settings are kept"
    assert seen[-1]["messages"] == [{"role": "user", "content": "again"}], "a system prompt is its conversation's"
    ask(page, "/etc/hosts is a file")
    assert questions(page)[-1] == "/etc/hosts is a file"


def test_a_busy_server_is_asked_again_and_then_answers(context, page, server):
    engine = server[1]
    engine.gate.clear()
    others = [open_page(context, server[0]) for _ in range(2)]
    for other in others:
        send(other, "first")
        other.locator(".writing").wait_for()
    page.wait_for_timeout(200)
    send(page, "patient")
    sync_api.expect(page.locator("#status")).to_contain_text("busy")
    engine.gate.set()
    settle(page)
    assert answers(page) == ["So: patient"] and page.locator("#status").inner_text() == ""
    for other in others:
        settle(other)
        assert answers(other) == ["So: first"]
    page.problems = [problem for problem in page.problems if "429" not in problem]


def test_a_server_that_is_gone_is_told_and_nothing_is_lost(context, server):
    page = open_page(context, server[0])
    ask(page, "one")
    context.set_offline(True)
    ask(page, "two")
    assert "cannot be reached" in page.locator(".note.error").inner_text()
    sync_api.expect(page.locator("#status")).to_contain_text("gone")
    context.set_offline(False)
    sync_api.expect(page.locator("#status")).to_be_empty()
    page.get_by_role("button", name="Try again").click()
    settle(page)
    assert answers(page) == ["So: one", "So: two"]


def test_a_conversation_that_is_too_long_says_what_the_model_did_not_see(page):
    for i in range(4):
        ask(page, f"{'x' * 200}{i}")
    order = page.locator("#turns > *").evaluate_all("nodes => nodes.map(node => node.className.split(' ').pop())")
    assert order == ["user", "assistant"] * 2 + ["wide"] + ["user", "assistant"] * 2, (
        "one line, where its memory begins"
    )
    assert "did not see" in page.locator(".note.wide").inner_text()
    page.fill("#input", "y" * 8001)
    assert page.locator("#send").is_disabled() and "8001 characters" in page.locator("#too-long").inner_text()
    page.fill("#input", "short")
    assert page.locator("#send").is_enabled() and "small model" in page.locator("#hint").inner_text()


def test_one_conversation_in_two_tabs_is_written_by_one_at_a_time(context, server):
    first, second = open_page(context, server[0]), open_page(context, server[0])
    ask(first, "one")
    server[1].pause = 0.01
    send(first, "long")
    first.locator(".writing").wait_for()
    second.goto(first.url)
    sync_api.expect(second.get_by_text("Another tab is writing")).to_be_visible(timeout=10_000)
    assert second.locator("#send").is_disabled()
    assert all(button.is_disabled() for button in second.get_by_role("button", name="Regenerate").all())
    first.keyboard.press("Escape")
    settle(first)
    said = answers(first)[1]
    sync_api.expect(second.locator(".assistant .body").nth(1)).to_have_text(said.rstrip())
    send(first, "long")
    first.locator(".writing").wait_for()
    second.get_by_role("button", name="Delete one").click()
    second.get_by_role("button", name="Delete one").click()
    sync_api.expect(first.locator("#welcome")).to_be_visible()
    server[1].pause = 0.0
    first.reload()
    sync_api.expect(first.locator("#conversations li")).to_have_count(0)
    assert first.problems == second.problems == []


def test_when_a_tab_goes_away_the_other_goes_on(context, server):
    first, second = open_page(context, server[0]), open_page(context, server[0])
    ask(first, "one")
    server[1].pause = 0.02
    send(first, "long")
    sync_api.expect(first.locator(".writing .body")).to_contain_text("word " * 20, timeout=20_000)  # kept every second
    second.goto(first.url)
    sync_api.expect(second.get_by_text("Another tab is writing")).to_be_visible(timeout=10_000)
    first.close(run_before_unload=False)
    server[1].pause = 0.0
    sync_api.expect(second.get_by_text("Another tab is writing")).to_have_count(0, timeout=15_000)
    assert "Not finished." in second.locator(".assistant").nth(1).inner_text()
    assert answers(second)[1].startswith("word")
    button(second, "Regenerate").click()
    settle(second)
    assert "2/2" in second.locator(".assistant .actions").nth(1).inner_text()
    assert second.problems == []


def test_another_conversation_can_be_opened_while_an_answer_is_written(page, server):
    server[1].pause = 0.01
    send(page, "long")
    page.locator(".writing").wait_for()
    page.click("#new")
    ask(page, "two")
    assert answers(page) == ["So: two"]
    page.get_by_role("link", name="long").click()
    sync_api.expect(page.locator(".writing .body")).to_contain_text("word")
    page.go_back()
    sync_api.expect(page.locator(".assistant .body")).to_have_text("So: two")
    page.go_forward()
    sync_api.expect(page.locator(".assistant .body")).to_contain_text("word")
    server[1].pause = 0.0
    settle(page)
    assert answers(page) == [("word " * 80).strip()]
    page.reload()
    sync_api.expect(page.locator(".assistant .body")).to_contain_text("word " * 79)


def test_a_panel_stays_open_while_the_answer_grows_and_under_its_token_when_the_window_changes(page, server):
    page.click("#microscope")
    server[1].pause = 0.01
    send(page, "long")
    page.locator("#turns .token").nth(3).click()
    panel = page.get_by_role("region", name="Token")
    before = page.locator("#turns .token").count()
    sync_api.expect(page.locator("#turns .token").nth(before + 90)).to_be_attached()
    assert f"id {ord('d')}" in panel.inner_text()
    page.keyboard.press("Escape")
    assert not panel.is_visible() and page.locator(".writing").count() == 1, "it closes the panel"
    page.keyboard.press("Escape")  # and then stops the answer
    settle(page)
    server[1].pause = 0.0
    page.locator("#turns .token").nth(60).click()
    for width in (500, 1100):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_timeout(200)
        token, box = (page.locator(each).bounding_box() for each in ("#turns .token[aria-expanded=true]", ".panel"))
        assert 0 <= box["y"] - (token["y"] + token["height"]) < 30
    page.keyboard.press("ArrowDown")
    assert page.locator("#turns .token[aria-expanded=true]").bounding_box()["y"] > token["y"]


def test_an_answer_that_fills_the_context_does_not_go_on_and_stays(page):
    page.click("#open-settings")
    page.fill("#max_tokens", "4000")
    page.get_by_role("button", name="Done").click()
    ask(page, "endless")
    said = answers(page)
    assert "Cut off" in page.locator(".note:visible").inner_text()
    button(page, "Go on").click()
    settle(page)
    assert page.locator(".note.error:visible").inner_text().endswith("there is no room to go on.")
    assert page.get_by_role("button", name="Try again").count() == 0
    assert answers(page) == said and "Cut off" in page.locator(".assistant").inner_text()
    page.reload()
    page.locator(".assistant").wait_for()
    assert answers(page) == said
    page.problems = [problem for problem in page.problems if "400" not in problem]


def test_an_edit_that_is_sent_while_an_answer_is_written_waits_in_its_box(page, server):
    ask(page, "one")
    page.press("#input", "ArrowUp")
    box = page.get_by_label("Edit the message")
    box.fill("uno")
    server[1].pause = 0.01
    send(page, "long")
    page.locator(".writing").wait_for()
    box.press("Enter")
    sync_api.expect(page.locator("#status")).to_contain_text("being written")
    server[1].pause = 0.0
    settle(page)
    assert box.input_value() == "uno" and len(answers(page)) == 2
    box.press("Enter")
    settle(page)
    assert (questions(page), answers(page)) == (["uno"], ["So: uno"])


def test_another_tab_waits_for_a_slow_first_token(context, server):
    first, second = open_page(context, server[0]), open_page(context, server[0])
    server[1].gate.clear()
    send(first, "one")
    first.locator(".writing").wait_for()
    second.goto(first.url)
    second.wait_for_timeout(8000)
    assert second.get_by_text("Another tab is writing").count() == 1
    assert second.get_by_role("button", name="Try again").count() == 0
    server[1].gate.set()
    sync_api.expect(second.locator(".assistant .body")).to_have_text("So: one")
    assert second.get_by_text("Another tab is writing").count() == 0


def test_a_question_that_was_not_answered_can_be_asked_again(page, server):
    server[1].gate.clear()
    send(page, "one")
    page.locator(".writing").wait_for()
    page.wait_for_timeout(200)
    page.reload()
    server[1].gate.set()
    page.get_by_role("button", name="Try again").click()
    settle(page)
    assert (questions(page), answers(page)) == (["one"], ["So: one"])
    page.locator(".user").hover()
    button(page, "Edit", ".user").click()
    page.get_by_label("Edit the message").press("Enter")
    settle(page)
    assert questions(page) == ["one"] and "2/2" in page.locator(".assistant .actions").inner_text()


def test_the_focus_stays_where_one_goes_on(page):
    def focused():
        return page.evaluate("document.activeElement.ariaLabel || document.activeElement.id")

    page.get_by_role("button", name="Who are you?").click()
    settle(page)
    assert focused() == "Message"
    button(page, "Regenerate").click()
    settle(page)
    assert focused() == "Message"
    button(page, "The one before").click()
    assert focused() == "The one after", "the one before cannot be used any more"
    page.locator(".user").hover()
    button(page, "Edit", ".user").click()
    page.keyboard.press("Escape")
    assert focused() == "Edit"
    page.locator("#skip").focus()
    page.keyboard.press("Enter")
    assert focused() == "Message" and len(answers(page)) == 1


def test_what_is_there_is_not_touched_while_an_answer_is_written(page, server):
    ask(page, "markdown")
    page.evaluate("window.kept = [...document.querySelectorAll('#turns article')]")
    server[1].pause = 0.005
    send(page, "long")
    page.locator(".writing").wait_for()
    page.locator(".user .body").first.click(click_count=3)
    settle(page)
    server[1].pause = 0.0
    assert page.evaluate("window.kept.every((node, i) => node === document.querySelectorAll('#turns article')[i])")
    assert page.evaluate("getSelection().toString().trim()") == "markdown"
    sync_api.expect(page.locator("#announcer")).to_contain_text("nanochat: word word")


def test_a_key_is_asked_for_and_a_wrong_one_told(context):
    model = random_model(small_config(TOKENIZER.vocab_size, sequence_len=128), seed=5)
    workers = [EngineWorker(ScriptedEngine(model, TOKENIZER))]
    with serving(workers, TOKENIZER, 128, model_name="locked", api_key="right") as (address, _):
        page = context.new_page()
        page.goto(address)
        note = page.locator("#key-note")
        sync_api.expect(note).to_contain_text("wants an API key")
        for key, says in (("wrong", "refused this API key"), ("right", None)):
            page.fill("#key", key)
            page.press("#key", "Tab")
            if says:
                sync_api.expect(note).to_contain_text(says)
        sync_api.expect(page.locator("#model")).to_have_text("locked")
        page.get_by_role("button", name="Done").click()
        ask(page, "hi")
        assert answers(page) == ["So: hi"]


def test_a_browser_that_keeps_nothing_says_so_and_works(browser, server):
    context = browser.new_context()
    context.add_init_script("indexedDB.open = () => { throw new Error('forbidden') }")
    page = open_page(context, server[0])
    sync_api.expect(page.locator("#kept")).to_contain_text("keeps nothing")
    ask(page, "one")
    ask(page, "two")
    assert answers(page) == ["So: one", "So: two"] and page.locator("#conversations li").count() == 1
    assert page.problems == []
    context.close()


RENDER = """async ([text, what]) => {
    const { render } = await import("/ui/markdown.js");
    const box = document.createElement("div");
    box.append(render([{ type: "text", text }]));
    return what === "count" ? box.querySelectorAll("*").length : what === "text" ? box.textContent
        : [...box.querySelectorAll(what)].map((node) => node.textContent);
}"""


@pytest.mark.parametrize(
    "text, selector, expected",
    [
        ("***both***", "strong em", ["both"]),
        ("日本**太字**です", "strong", ["太字"]),
        ("2*3*4 and 2**3**4 and snake_case_name", "em, strong", []),
        ("**open and `code ** here` then", "strong", []),
        ("a\\*b\\* `c`", "em", []),
        ("1. x\n   ```\n   code\n   ```", "pre code", ["code"]),
        ("- a\r\n- b", "li", ["a", "b"]),
        ("- a\n\n- b\n\n  more", "li", ["a", "bmore"]),
        ("```py\nnever closed", "pre code", ["never closed"]),
        ('see [x](https://e.com/a_(b) "t") and https://e.com/a_(b).', "a", ["x", "https://e.com/a_(b)"]),
        ("![i](https://e.com/i.png)", "a", ["i"]),
        ("[https://bank.com](https://evil.com/)", "a", ["https://evil.com/"]),
        ("[x](javascript:alert(1))", "a", []),
        ("|a|b|\n|-|-|\n|`x|y`|1\\|2|3|", "td", ["x|y", "1|2", "3"]),
        ("|a\n|-\n|b", "td", ["b"]),
        ("> a\n> > b", "blockquote blockquote", ["b"]),
        ("# one\n## two ##", "h3, h4", ["one", "two"]),
        ("\ufdd00\ufdd1 [\ufdd07\ufdd1](https://e.com)", ".tool", []),
    ],
)
def test_markdown_as_models_write_it(page, text, selector, expected):
    assert page.evaluate(RENDER, [text, selector]) == expected


@pytest.mark.parametrize(
    "text",
    [
        "|a" * 8000 + "\n" + "|-" * 8000 + "\n" + "|b\n" * 8000,
        "- a\n" + "\n" * 16000 + "  b",
        "``` " + " " * 16000 + "`",
        "a|\n-" + " " * 16000 + "x",
        "> " * 8000 + "deep",
        "* " * 8000,
        "**a " * 4000,
        "`" * 16000 + "x",
        "[" * 16000,
        "# " + " #" * 8000 + "x",
    ],
)
def test_no_text_makes_more_elements_than_it_has_characters(page, text):
    assert page.evaluate(RENDER, [text, "count"]) <= len(text)


def test_conversations_are_deleted_only_at_the_second_click(page):
    ask(page, "one")
    ask(page, "/clear")
    ask(page, "two")
    entries = page.locator("#conversations li")
    assert entries.all_inner_texts() == ["two\n×", "one\n×"]
    delete = page.get_by_role("button", name="Delete one")
    delete.click()
    assert entries.count() == 2
    delete.click()
    sync_api.expect(entries).to_have_count(1)
    page.reload()
    sync_api.expect(entries).to_have_count(1)
    assert questions(page) == ["two"]


def test_by_keyboard_alone(page):
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line")
    page.keyboard.press("Enter")
    settle(page)
    assert questions(page) == ["one\nline"]
    page.keyboard.press("Shift+Tab")
    for _ in range(40):
        if page.evaluate("document.activeElement.ariaLabel") == "Regenerate":
            break
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    settle(page)
    assert "2/2" in page.locator(".assistant .actions").inner_text()


def test_everything_that_can_be_used_has_a_name(page):
    ask(page, "markdown")
    page.click("#microscope")
    page.locator("#turns .token").first.click()
    page.click("#open-settings")
    nameless = """nodes => nodes.filter(node => !(node.ariaLabel || node.textContent.trim() || node.labels?.length))
        .map(node => node.outerHTML)"""
    assert page.locator("button, a, input, textarea, select, output").evaluate_all(nameless) == []
    assert page.locator("h1").count() == 1 and page.locator("main").count() == 1
    ids = page.locator("[id]").evaluate_all("nodes => nodes.map(node => node.id)")
    assert len(ids) == len(set(ids))


def test_a_phone_has_a_drawer_and_no_sideways_scrolling(browser, server):
    context = browser.new_context(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    page = open_page(context, server[0])
    page.fill("#input", "markdown")
    page.press("#input", "Enter")  # breaks the line: there is no Shift on a phone
    assert page.locator("#input").input_value() == "markdown\n"
    page.tap("#send")
    settle(page)
    page.tap("#microscope")
    page.locator("#turns .token").first.tap()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator(".bar").first.bounding_box()["width"] > 30
    page.tap("#open-settings")
    for part in ("#settings .solid", "#settings output >> nth=0", "#system"):
        box = page.locator(part).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360, part
    page.get_by_role("button", name="Done").tap()
    assert not page.get_by_role("navigation").is_visible()
    page.tap("#menu")
    assert page.get_by_role("link", name="markdown").is_visible()
    assert page.locator("main").evaluate("main => main.inert"), "behind the veil nothing has the focus"
    page.tap("#new")
    assert not page.get_by_role("navigation").is_visible() and page.locator("#welcome").is_visible()
    assert page.problems == []
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_in_both_colours(browser, server, scheme):
    """WCAG's contrast of 4.5 for what is said and what explains it."""
    context = browser.new_context(color_scheme=scheme)
    page = open_page(context, server[0])
    ask(page, "sum")
    contrast = """() => {
        const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const light = (color) => {
            canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
            const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)
                .map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
        };
        const behind = (node) => {
            for (; node; node = node.parentElement) {
                const color = getComputedStyle(node).backgroundColor;
                if (color !== "rgba(0, 0, 0, 0)") return color;
            }
        };
        return Object.fromEntries([".user .body", ".assistant .body", ".tool code", ".tool .result", "#hint", "#model",
            "#new", "#conversations a", ".rate"].map((selector) => {
                const node = document.querySelector(selector);
                const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
                return [selector, (a + 0.05) / (b + 0.05)];
            }));
    }"""
    assert {name: value for name, value in page.evaluate(contrast).items() if value < 4.5} == {}
    context.close()
