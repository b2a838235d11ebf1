"""The page at `/`, in headless Chromium where that is installed."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from local_application import served_here

from app.config import ApplicationConfig, validate

MARKUP = "<img src=x onerror=document.title='broken'>"


@pytest.fixture(scope="module")
def url(model_dir: Path, delta_dir: Path, index_dir: Path) -> Iterator[str]:
    generator = {"model": str(model_dir), "deltas": {"tuned": str(delta_dir)}, "threads": 1, "max_batch_size": 8}
    config = validate(ApplicationConfig, {"generator": generator, "retriever": {"index": str(index_dir), "top_k": 2}})
    with served_here(config) as url:
        yield url


def test_a_browser_gets_the_page_and_others_a_line_of_json(url):
    assert httpx.get(url, trust_env=False).json()["documentation"] == "/docs"
    page = httpx.get(url, headers={"accept": "text/html,application/xhtml+xml"}, trust_env=False)
    assert page.headers["content-type"].startswith("text/html")
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    for directive in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert policy.pop(directive) == "'none'"
    assert policy.pop("connect-src") == "'self'" and set(policy) == {"script-src", "style-src"}
    assert all(re.fullmatch(r"'sha256-[^' ]+'( 'unsafe-hashes')?", sources) for sources in policy.values())
    assert page.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"""(src|href)=["']?https?:|@import|url\(""", page.text), "nothing is loaded from elsewhere"


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on PATH; Debian's package is called chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.problems = []
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto(url)
    page.locator("#model option").nth(1).wait_for(state="attached")
    yield page
    context.close()


def ask(page, text: str) -> str:
    """By keyboard alone; the answer."""
    asked = page.locator("#log > .facts").count()
    page.focus("#text")
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    page.locator("#log > .facts").nth(asked).wait_for()  # stands below an answer that has ended
    return page.locator(".turn").last.inner_text()


def test_a_chat_streams_and_says_how_fast_and_whence(page, greedy):
    from app.data.prompts import PacosTemplate

    page.fill("#max_tokens", "12")
    expected = greedy(PacosTemplate().prompt("Why do alpacas hum?"), 12)
    assert ask(page, "Why do alpacas hum?").split() == expected.split()
    facts = page.locator("#log > .facts").last.inner_text()
    assert "pacos · 12 tokens" in facts and "cache miss" in facts and "cut at max tokens" in facts
    ask(page, "Why do alpacas hum?")
    assert "cache hit" in page.locator("#log > .facts").last.inner_text()
    assert page.problems == []


def test_every_control_reaches_the_request(page):
    values = {
        "temperature": "0.7", "seed": "5", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "repetition_penalty": "1.1",
        "max_tokens": "7", "stop": "zzz", "system": "Be brief.",
    }  # fmt: skip
    for name, value in values.items():
        page.fill(f"#{name}", value)
    page.select_option("#model", "pacos:tuned")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "hay")
    sent = request.value.post_data_json
    for name in ("temperature", "seed", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens"):
        assert sent[name] == float(values[name])
    assert sent["stop"] == ["zzz"] and sent["model"] == "pacos:tuned"
    assert [message["role"] for message in sent["messages"]] == ["system", "user"]
    page.check("#remember")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "more")
    assert [message["role"] for message in request.value.post_data_json["messages"]] == [
        "system", "user", "assistant", "user",
    ]  # fmt: skip


def test_citations_open_by_keyboard(page):
    page.check("#rag")
    ask(page, "How often does shearing take place?")
    first = page.locator(".cites details").first
    assert "Shearing" in first.inner_text() and first.get_attribute("open") is None
    first.locator("summary").focus()
    page.keyboard.press("Enter")
    assert "shearing.md, characters" in first.inner_text()
    assert page.problems == []


def test_escape_stops_an_answer_and_a_mistake_is_told(page):
    page.fill("#max_tokens", "2000")
    page.focus("#text")
    page.keyboard.type("hay")
    page.keyboard.press("Enter")
    page.locator(".turn.running", has_text=re.compile(r"\S")).wait_for()
    page.keyboard.press("Escape")
    page.locator("#log > .facts").wait_for()
    assert "stopped" in page.locator("#log > .facts").last.inner_text()
    page.fill("#temperature", "9")
    assert "temperature" in ask(page, "hay")
    assert page.locator(".turn.failed").count() == 1


def test_a_new_conversation_has_nothing_of_an_answer_that_ran_when_it_began(page):
    page.fill("#max_tokens", "2000")
    page.check("#remember")
    page.focus("#text")
    page.keyboard.type("hay")
    page.keyboard.press("Enter")
    page.locator(".turn.running", has_text=re.compile(r"\S")).wait_for()
    page.click("#clear")
    page.locator("#send", has_text="Send").wait_for()  # the answer has ended
    page.fill("#max_tokens", "3")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "dogs")
    sent = request.value.post_data_json["messages"]
    assert sent == [{"role": "user", "content": "dogs"}]
    assert page.locator(".turn").count() == 2 and page.problems == []


def test_what_a_model_says_is_text_and_nothing_else(page):
    said = MARKUP + " says the model"
    events = [{"choices": [{"delta": {"content": said}}]}, {"choices": [], "usage": {"completion_tokens": 3}}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    assert ask(page, MARKUP) == said
    assert page.locator(".turn.user").last.inner_text() == MARKUP
    assert page.locator("#log img").count() == 0 and page.title() == "Pacos playground"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser, url, scheme):
    context = browser.new_context(viewport={"width": 375, "height": 700}, color_scheme=scheme)
    page = context.new_page()
    page.goto(url)
    page.locator("#model option").nth(1).wait_for(state="attached")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert not page.locator("#settings").is_visible()
    page.click("#settings-button")
    assert page.locator("#settings").is_visible() and page.get_attribute("#settings-button", "aria-expanded") == "true"
    paper = page.evaluate("getComputedStyle(document.querySelector('#settings')).backgroundColor")
    assert (paper == "rgb(25, 24, 22)") == (scheme == "dark")
    context.close()


@pytest.fixture(scope="module")
def library_url(model_dir: Path, index_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same, with documents that can be uploaded."""
    retriever = {"index": str(index_dir), "documents": str(tmp_path_factory.mktemp("documents")), "top_k": 2}
    generator = {"model": str(model_dir), "threads": 1, "max_batch_size": 8}
    with served_here(validate(ApplicationConfig, {"generator": generator, "retriever": retriever})) as url:
        yield url


def test_without_a_library_there_is_no_panel_of_documents(page):
    assert not page.locator("#documents").is_visible() and page.problems == []


def test_documents_are_uploaded_read_and_deleted_by_keyboard(browser, library_url, tmp_path):
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(library_url)
    rows = page.locator("#documents-list li")
    rows.nth(2).wait_for()
    (tmp_path / "dentist.md").write_text(f"# 🦙 Dentist {MARKUP}\n\nThe alpaca dentist visits the herd in spring.\n")
    page.set_input_files("#upload", [tmp_path / "dentist.md"])
    rows.nth(3).wait_for()
    assert "1 stored" in page.locator("#documents-state").inner_text()
    with page.expect_response(lambda response: response.request.method == "PUT") as replaced:
        page.set_input_files("#upload", [tmp_path / "dentist.md"])
    assert replaced.value.status == 200
    page.wait_for_timeout(1500)  # found everywhere within two seconds
    page.check("#rag")
    ask(page, "When does the alpaca dentist visit the herd?")
    page.locator(".cites summary").first.focus()
    page.keyboard.press("Enter")
    page.locator(".cites details[open] button").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#reader mark").inner_text() == "The alpaca dentist visits the herd in spring."
    assert MARKUP in page.locator("#reader-text").inner_text() and MARKUP in page.locator(".cites").inner_text()
    assert page.locator("#reader img, .cites img").count() == 0
    page.keyboard.press("Escape")
    assert not page.locator("#reader").is_visible()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete dentist.md").focus()
    page.keyboard.press("Enter")
    rows.filter(has_text="dentist.md").wait_for(state="detached")
    assert rows.count() == 3
    assert page.evaluate("document.activeElement.tagName") == "BUTTON", "focus stays in the list"
    context.close()
