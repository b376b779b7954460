"""The chat page in a real browser: Chromium without a window."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from stub_server import ANSWER, NAME, stub

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=900,700",
)

pytestmark = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no chromium and chromedriver here")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.implicitly_wait(0)
    yield Browser(driver)
    driver.quit()


class Browser:
    """What the tests do with a page."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, url):
        self.driver.get(url)
        self.driver.get_log("browser")

    def find(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector):
        """Of the last that is there, as it is in the document."""
        found = self.find(selector)
        return found[-1].get_property("textContent") if found else None

    def wait(self, condition):
        return WebDriverWait(self.driver, 20, 0.01).until(lambda _: condition())

    def ask(self, question, keys=Keys.ENTER):
        self.find("#question")[0].send_keys(question, keys)

    def idle(self):
        return self.find("#send")[0].is_displayed() and not self.find("#stop")[0].is_displayed()

    def set(self, name, value):
        if not self.find("details[open]"):
            self.find("summary")[0].click()
        field = self.find(f"#{name}")[0]
        field.clear()
        field.send_keys(value)

    def complaints(self):
        """What the browser says of the page, such as that it broke its own policy; not of answers that are errors."""
        return [each for each in self.driver.get_log("browser") if "the server responded with" not in each["message"]]


@contextmanager
def page(browser, tokenizer, script=None, **changes):
    """A page and the server that it came from."""
    with stub(tokenizer, script, **changes) as server:
        browser.open(server.url)
        try:
            yield server
            assert browser.complaints() == []
        finally:
            browser.driver.get("about:blank")


def test_a_question_is_answered_as_it_streams(browser, v3):
    with page(browser, v3, step_seconds=0.05) as server:
        browser.wait(lambda: browser.text("#model") == NAME)
        browser.ask("How are you? <b>&amp;</b>")
        assert browser.text(".user") == "How are you? <b>&amp;</b>"
        partial = browser.wait(lambda: browser.text(".assistant"))
        assert ANSWER.startswith(partial)
        assert partial != ANSWER
        assert not browser.idle()
        browser.wait(browser.idle)
        assert browser.text(".assistant") == ANSWER
        assert browser.text("#problem") == ""
        # The history goes along with the next question.
        browser.ask("And then?")
        browser.wait(lambda: len(browser.find(".assistant")) == 2 and browser.idle())
        prompt = v3.decode(server.engine.requests[-1].prompt)
        assert prompt == f"How are you? <b>&amp;</b> {ANSWER} And then?"


def test_settings_are_sent(browser, v3):
    with page(browser, v3) as server:
        browser.set("system", "Be brief.")
        browser.set("temperature", "0.3")
        browser.set("tokens", "5")
        browser.ask("one", Keys.SHIFT + Keys.ENTER)
        browser.ask("two")
        browser.wait(lambda: browser.text(".note") == "The answer ends here: there was no room for more.")
        request = server.engine.requests[-1]
        assert v3.decode(request.prompt) == "Be brief.\n\none\ntwo"
        assert (request.sampling.temperature, request.max_new_tokens) == (0.3, 5)


def test_an_answer_can_be_stopped(browser, v3):
    endless = v3.encode("again")
    with page(browser, v3, lambda request: endless, max_length=100_000, step_seconds=0.01) as server:
        browser.ask("Go on")
        browser.wait(lambda: len(browser.text(".assistant") or "") > 20)
        browser.find("#stop")[0].click()
        browser.wait(browser.idle)
        assert browser.text(".note") == "Stopped."
        browser.wait(lambda: server.worker.open_texts == 0)
        said = browser.text(".assistant")
        assert said.startswith("again again")
        # Half an answer is part of the history; a new conversation has none.
        browser.find("#anew")[0].click()
        assert browser.find(".message") == []
        browser.ask("Else")
        browser.wait(lambda: len(browser.text(".assistant") or "") > 5)
        assert v3.decode(server.engine.requests[-1].prompt) == "Else"
        browser.find("#anew")[0].click()
        browser.wait(browser.idle)
        assert browser.find(".message, .note") == []


def test_errors_are_shown_and_the_question_comes_back(browser, v3):
    with page(browser, v3) as server:
        browser.driver.execute_script("arguments[0].value = 'word '.repeat(600)", browser.find("#question")[0])
        browser.ask("")
        problem = browser.wait(lambda: browser.text("#problem"))
        assert problem.startswith("400: prompt: the prompt has ")
        assert browser.find(".message") == []
        assert browser.find("#question")[0].get_property("value").startswith("word word")
        browser.find("#question")[0].clear()
        server.engine.broken = RuntimeError("out of memory")
        browser.ask("Hi")
        browser.wait(lambda: browser.text("#problem") == "the engine failed")


def test_a_key_is_wanted(browser, v3):
    with stub(v3, settings={"api_keys": ("sk-first", "sk-second")}) as server:
        browser.open(server.url.replace("http://", "http://anybody:sk-first@"))
        browser.wait(lambda: browser.text("#model") == NAME)
        browser.ask("Hi")
        browser.wait(lambda: browser.text(".assistant") == ANSWER and browser.idle())
        browser.set("key", "wrong")
        browser.ask("Hi")
        browser.wait(lambda: (browser.text("#problem") or "").startswith("401: a key is wanted"))
        browser.find("#question")[0].clear()
        browser.set("key", "sk-second")
        browser.ask("Hi")
        browser.wait(lambda: len(browser.find(".assistant")) == 2 and browser.idle())
        assert browser.text("#problem") == ""
        browser.driver.get("about:blank")
