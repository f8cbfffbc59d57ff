"""The playground in a headless browser: what is generated, drawn and said there, in the dark and in the light."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from specgen import Engine
from tests.support.servers import World, serving

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PROMPT = "one two three, one two three, one two three"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser at {CHROMIUM}; CHROMIUM names another"),
]


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        found = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        await found.close()


async def opened(browser: Browser, world: World, **options: Any) -> tuple[Page, list[str]]:
    """The page, and what its console complains about, requests to other hosts included."""
    page = await browser.new_page(viewport={"width": 1100, "height": 900}, **options)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith((world.url, "data:")) else None)
    await page.goto(world.url)
    return page, complaints


async def test_the_page_shows_who_guessed_what(shared_engine: Engine, browser: Browser, tmp_path: Path) -> None:
    shots = Path(os.environ.get("SPECGEN_SCREENSHOTS", tmp_path))
    async with serving(shared_engine) as world:
        said = None
        for scheme in ("light", "dark"):
            page, complaints = await opened(browser, world, color_scheme=scheme)
            await page.route("**/v1/chat/completions", eager)
            await expect(page.get_by_label("Model or adapter").locator("option")).to_have_text(["tiny"])
            await page.get_by_label("Prompt").fill(PROMPT)
            await page.get_by_text("Settings").click()
            await page.get_by_label("Most tokens").fill("60")
            if said:
                await page.get_by_label("Prediction").fill(said)
            await page.get_by_role("button", name="Compare with plain").click()
            await expect(page.locator("#verdict")).to_contain_text("The same text", timeout=30_000)
            said = said or await page.locator("#answer").text_content()
            assert await page.locator("#answer").text_content() == said
            assert await page.locator("#count-off").text_content() == "60 / 60"
            assert await page.locator("#answer .guessed").count() > 0
            assert await page.locator("#legend li").count() > 1
            assert await page.locator("#tree svg g").count() > 1
            label = await page.locator("#tree svg").get_attribute("aria-label")
            assert label
            assert "guesses, accepted" in label
            length = await page.locator("#length-on").text_content()
            assert length
            assert float(length) > 1.0
            await page.screenshot(path=shots / f"page-{scheme}.png", full_page=True)
            assert not complaints
            await page.close()


async def eager(route: Any) -> None:
    """Draft without looking at the clock: on a tiny model nothing pays."""
    body = route.request.post_data_json
    drafting = {"speculation": {"adaptive": False, "max_nodes": 12}} if body["speculation"] == "auto" else {}
    await route.continue_(post_data={**body, **drafting})


@pytest.mark.slow
async def test_stopping_ends_the_request(shared_engine: Engine, browser: Browser) -> None:
    async def slow(route: Any) -> None:
        body = route.request.post_data_json
        await route.continue_(post_data={**body, "plugin_processors": {"slow": {"seconds": 0.05}}})

    async with serving(shared_engine) as world:
        page, _ = await opened(browser, world)
        await page.route("**/v1/chat/completions", slow)
        await page.get_by_role("button", name="Generate").click()
        await expect(page.locator("#status")).to_have_text("Generating…")
        await page.get_by_role("button", name="Stop").click()
        await expect(page.locator("#status")).to_contain_text("Stopped after")
        await world.idle()


@pytest.mark.slow
async def test_a_key_is_asked_for_and_used(shared_engine: Engine, browser: Browser) -> None:
    async with serving(shared_engine, api_keys=("secret-key",)) as world:
        page, _ = await opened(browser, world)
        await page.get_by_role("button", name="Generate").click()
        await expect(page.get_by_role("alert")).to_contain_text("send a valid key")
        await page.get_by_text("Settings").click()
        await page.get_by_label("API key").fill("secret-key")
        await page.get_by_label("Most tokens").fill("9")
        await page.get_by_role("button", name="Generate").click()
        await expect(page.locator("#status")).to_contain_text("9 tokens", timeout=30_000)
        await expect(page.get_by_role("alert")).to_be_hidden()


@pytest.mark.slow
async def test_the_page_can_be_used_by_keyboard_and_needs_little_width(shared_engine: Engine, browser: Browser) -> None:
    async with serving(shared_engine) as world:
        page, _ = await opened(browser, world)
        await page.set_viewport_size({"width": 360, "height": 800})
        overflow = await page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0
        await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.className") == "skip"
        await page.get_by_label("Prompt").focus()
        await page.keyboard.press("Control+Enter")
        await expect(page.locator("#status")).to_contain_text("128 tokens", timeout=30_000)
        fields = "[...document.querySelectorAll('input, textarea, select, button')]"
        unnamed = await page.evaluate(f"{fields}.filter((e) => !e.labels?.length && !e.textContent.trim()).length")
        assert unnamed == 0


async def test_the_page_can_be_left_out(shared_engine: Engine) -> None:
    async with serving(shared_engine, page=False) as world, world.http.get(world.url) as answer:
        assert answer.status == 404
