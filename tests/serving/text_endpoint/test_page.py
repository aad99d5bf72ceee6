"""The page in a real browser, on a real endpoint. Needs Chromium and playwright; skipped, and said, without."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator

import httpx
import pytest
from serving.text_app import TEXT, TOKEN

CHROMIUM = os.environ.get("DMM_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no Chromium found; install it or set DMM_CHROMIUM to its path", allow_module_level=True)
Browser, Page = (playwright := pytest.importorskip("playwright.sync_api")).Browser, playwright.Page
expect = playwright.expect

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
MARKUP = "<img src=x onerror=alert(1)> a"
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


class Tab:
    """A page that is being watched: what it asked for, and what went wrong in it."""

    def __init__(self, browser: Browser, width: int = 1280) -> None:
        self.page: Page = browser.new_context(viewport={"width": width, "height": 800}).new_page()
        self.page.set_default_timeout(30_000)
        self.asked: list[str] = []
        self.wrong: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))

    def open(self, url: str) -> Page:
        self.page.goto(url)
        return self.page


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    tab = Tab(browser)
    yield tab
    tab.page.context.close()
    assert tab.wrong == []


def score(page: Page, first: str, second: str = "") -> None:
    page.get_by_label("Text", exact=True).fill(first)
    page.get_by_label("Second text").fill(second)
    page.get_by_role("button", name="Score", exact=True).click()


def shows(page: Page, words: str | re.Pattern[str], status: str) -> None:
    expect(page.locator(f"#{status}-status")).to_contain_text(words)


def test_tokens_are_coloured_and_explained(tab: Tab, url: str) -> None:
    page = tab.open(url)
    score(page, TEXT, MARKUP)
    shows(page, "Scored. This prior is not calibrated", "score")
    expect(page.get_by_label("Tokens of text 1")).to_have_text("<s>" + TEXT)
    expect(page.get_by_label("Tokens of text 2")).to_have_text("<s>" + MARKUP)
    asked = [httpx.post(f"{url}/v1/score_text", json={"text": t}, timeout=60).json() for t in (TEXT, MARKUP)]
    nats = [token["nats"] for answer in asked for token in answer["tokens"]]
    tokens = page.locator(".tok")
    expect(tokens).to_have_count(len(nats))
    scored = sorted((n, i) for i, n in enumerate(nats) if n is not None)
    (least, lowest), (_, highest) = scored[0], scored[-1]
    expect(tokens.nth(lowest)).to_have_class("tok s4")
    expect(tokens.nth(highest)).to_have_class("tok s0")
    expect(tokens.nth(lowest)).to_have_attribute("title", re.compile(f"{abs(least):.2f} nats"))
    assert page.locator("img").count() == 0


def test_a_calibrated_prior_colours_by_percentile(tab: Tab, url: str) -> None:
    page = tab.open(url)
    page.get_by_label("Prior", exact=True).select_option("pair")
    score(page, TEXT)
    expect(page.locator("#score-status")).to_have_text("Scored.")
    expect(page.locator("#legend")).to_contain_text("Percentage of natural activations")
    body = {"text": TEXT, "model": "pair", "layer": 1}
    asked = httpx.post(f"{url}/v1/score_text", json=body, timeout=60).json()["tokens"]
    for i, token in enumerate(asked[1:], start=1):
        shade = next(k for k, least in enumerate((50, 20, 5, 1, -1)) if token["percentile"] >= least)
        expect(page.locator(".tok").nth(i)).to_have_class(f"tok s{shade}")
        expect(page.locator(".tok").nth(i)).to_have_attribute("title", re.compile("percentile [0-9]"))


def test_tokens_are_reached_by_keyboard(tab: Tab, url: str) -> None:
    page = tab.open(url)
    score(page, "the cat")
    shows(page, "Scored", "score")
    page.get_by_role("button", name="Score", exact=True).focus()
    page.keyboard.press("Tab")
    tokens = page.locator(".tok")
    expect(tokens.nth(0)).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(page.locator(".detail")).to_contain_text("nats")
    page.keyboard.press("End")
    expect(tokens.last).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()


def test_steered_texts_stand_side_by_side(tab: Tab, url: str) -> None:
    page = tab.open(url)
    page.get_by_label("Prompt", exact=True).fill("the cat sat")
    page.get_by_label("Direction", exact=True).select_option("up")
    page.get_by_label("Strength, slider").fill("1.5")
    expect(page.get_by_label("Strength, in mean")).to_have_value("1.5")
    page.get_by_label("Tokens", exact=True).fill("8")
    page.get_by_role("button", name="Generate", exact=True).click()
    shows(page, "Done.", "generate")
    body = {"prompt": "the cat sat", "max_tokens": 8, "strength": 1.5, "u": 0.5, "direction": "up"}
    asked = {
        "plain": {**body, "direction": None, "project": False},
        "steered": {**body, "project": False},
        "projected": {**body, "project": True},
    }
    for name, sent in asked.items():
        found = httpx.post(f"{url}/v1/generate", json=sent, timeout=60).json()
        said = page.locator(f"#said-{name} p")
        expect(said.nth(0)).to_have_text("the cat sat" + found["text"], use_inner_text=False)
        expect(said.nth(1)).to_contain_text(f"NLL {found['nll']:.2f} nats per token, 8 tokens")


def test_a_generation_can_be_stopped(tab: Tab, url: str) -> None:
    page = tab.open(url)
    page.get_by_label("Tokens", exact=True).fill("60")
    stop = page.get_by_role("button", name="Stop", exact=True)
    page.get_by_role("button", name="Generate", exact=True).click()
    stop.click()
    shows(page, re.compile(r"Stopped\.|Done\."), "generate")
    expect(stop).to_be_disabled()
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_enabled()


def test_samples_have_near_tokens(tab: Tab, url: str) -> None:
    page = tab.open(url)
    page.get_by_label("Prior", exact=True).select_option("pair")
    page.get_by_label("Layer", exact=True).select_option("3")
    page.get_by_label("Samples", exact=True).fill("3")
    page.get_by_role("button", name="Draw", exact=True).click()
    shows(page, "3 drawn.", "draw")
    expect(page.locator("#drawn tbody tr")).to_have_count(3)
    expect(page.locator("#drawn tbody tr").first.locator(".near")).to_have_count(5)


def test_directions_are_those_of_the_layer(tab: Tab, url: str) -> None:
    page = tab.open(url)
    options = page.get_by_label("Direction", exact=True).locator("option")
    expect(options).to_have_text(["down", "up", "none: project only"])
    page.get_by_label("Prior", exact=True).select_option("pair")
    expect(options).to_have_text(["down", "none: project only"])


def test_errors_are_words_and_the_next_request_works(tab: Tab, url: str) -> None:
    page = tab.open(url)
    score(page, "cat " * 100)
    shows(page, "context of 64; send it in parts", "score")
    expect(page.locator("#score-status")).to_have_class("error")
    score(page, "the cat")
    shows(page, "Scored", "score")
    page.route("**/v1/score_text", lambda route: route.abort())
    score(page, "the cat")
    shows(page, "does not answer", "score")


def test_it_fits_a_phone(browser: Browser, url: str) -> None:
    tab = Tab(browser, width=360)
    page = tab.open(url)
    score(page, "x" * 40, TEXT)
    shows(page, "Scored", "score")
    page.get_by_role("button", name="Generate", exact=True).click()
    shows(page, "Done.", "generate")
    page.get_by_role("button", name="Draw", exact=True).click()
    shows(page, "drawn", "draw")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    tab.page.context.close()


def test_everything_has_a_name_and_nothing_comes_from_elsewhere(tab: Tab, url: str) -> None:
    page = tab.open(url)
    page.get_by_role("button", name="Draw", exact=True).click()
    shows(page, "drawn", "draw")
    assert {httpx.URL(asked).host for asked in tab.asked if not asked.startswith("data:")} == {"127.0.0.1"}
    fields = "[...document.querySelectorAll('input, select, textarea')]"
    assert page.evaluate(f"{fields}.filter(e => !e.labels.length && !e.ariaLabel).length") == 0
    assert page.locator("[role=status]").count() >= 4


def test_its_policy_stops_other_scripts(tab: Tab, url: str) -> None:
    page = tab.open(url)
    expect(page.locator("#texts")).to_be_visible()
    page.evaluate("""() => {
        const script = document.createElement('script');
        script.textContent = "document.title = 'taken over'";
        document.body.append(script);
    }""")
    expect(page).to_have_title("dmm-ray")
    assert "default-src 'none'" in httpx.get(url).headers["content-security-policy"]


def test_a_token_is_asked_for_and_without_a_language_model_it_shows_numbers(
    tab: Tab, url: str, guarded: str
) -> None:
    page = tab.open(f"{url}{guarded}/")
    expect(page.locator("#about")).to_contain_text("needs a token")
    for token, answer in (("wrong", "not one of the endpoint"), (TOKEN, "No language model is attached")):
        page.get_by_label("Access token").fill(token)
        page.keyboard.press("Enter")
        expect(page.locator("#about")).to_contain_text(answer)
    expect(page.get_by_label("Access token")).to_be_hidden()
    expect(page.locator("#texts")).to_be_hidden()
    page.get_by_label("Samples", exact=True).fill("2")
    page.get_by_role("button", name="Draw", exact=True).click()
    shows(page, "2 drawn.", "draw")
    expect(page.locator("#drawn tbody tr")).to_have_count(2)
