"""The page in a real browser: Debian's Chromium, driven by Playwright. Slow: it starts a browser."""

import shutil

import pytest

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="no browser driver: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no browser: apt-get install chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    from pyreft import pocket
    from served import Running

    made = Running(pocket.adapters(), tmp_path_factory.mktemp("store"), api_key=["secret"])
    yield made
    made.stop()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def visit(browser, served, **options):
    """The page, after its key was given; every request and every complaint of the browser is noted."""
    page = browser.new_page(**options)
    page.asked, page.complaints = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(served.url)
    page.get_by_label("API key").wait_for()
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").press("Enter")
    page.locator("#left option").nth(1).wait_for(state="attached")
    return page


def ask(page, text, answers=1):
    """Send a message, and wait for the so-manieth answer of each side."""
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")
    for side in ("left", "right"):
        told = page.locator(f"#{side}-turns .figures:not(:empty)")
        playwright.expect(told).to_have_count(answers, timeout=30_000)
    playwright.expect(page.locator("#send")).to_be_visible(timeout=30_000)


def test_an_adapter_answers_beside_the_base(browser, served):
    page = visit(browser, served, viewport={"width": 1100, "height": 760})
    assert (page.locator("#left").input_value(), page.locator("#right").input_value()) == ("emoji", "pocket")
    ask(page, "What is a whale?")
    left, right = (page.locator(f"#{side}-turns .assistant .text").inner_text() for side in ("left", "right"))
    assert left
    assert right
    assert left != right
    assert "tokens" in page.locator("#left-turns .figures").last.inner_text()
    page.get_by_text("Edited tokens of the last prompt").click()
    assert page.locator("#prompt-tokens mark").count() == 4  # the rule is l4
    page.get_by_text("The same with curl").click()
    assert '"model":"emoji"' in page.locator("#curl").inner_text()
    page.get_by_label("Strength").fill("0")
    page.get_by_role("button", name="New chat").click()
    ask(page, "What is a whale?")
    assert page.locator("#left-turns .assistant .text").inner_text() == right  # at strength 0 it is the base
    assert '"reft_strength":0' in page.locator("#curl").inner_text()
    assert all(url.startswith(served.url) for url in page.asked if not url.startswith("data:"))
    assert [text for text in page.complaints if "401" not in text] == []  # the first question was without a key
    page.close()


def test_on_a_phone_in_the_dark_by_keyboard(browser, served):
    page = visit(browser, served, viewport={"width": 375, "height": 700}, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 29)"
    names = []
    page.locator("body").press("Tab")
    for _ in range(20):
        names.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        page.keyboard.press("Tab")
    assert {"left", "right", "strength", "temperature", "tokens", "key", "clear", "message", "send"} <= set(names)
    ask(page, "What is a cat?")
    ask(page, "And a dog?", 2)
    assert page.locator("#left-turns .turn").count() == 4
    page.close()


def test_every_field_has_a_name_for_a_screen_reader(browser, served):
    page = visit(browser, served)
    unnamed = page.evaluate(
        """[...document.querySelectorAll('input, select, textarea, button')]
           .filter((it) => !it.labels?.length && !it.textContent.trim() && !it.ariaLabel).map((it) => it.id)"""
    )
    assert unnamed == []
    for role, name in (("combobox", "Left"), ("slider", "Strength"), ("textbox", "Message"), ("button", "Send")):
        assert page.get_by_role(role, name=name).count() == 1
    assert page.locator("[role=log]").count() == 2
    page.close()


def test_markup_in_an_answer_is_text(browser, served):
    page = visit(browser, served)
    ask(page, "<img src=x onerror=alert(1)>")
    assert page.locator("main img").count() == 0
    assert page.locator("#left-turns .user .text").inner_text() == "<img src=x onerror=alert(1)>"
    page.close()
