"""The page does what a person does with it, in a browser, on a server with a tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persona_lens.core.statistics import Verdict
from persona_lens.monitoring import Observations, calibrate, monitor_calibration
from persona_lens.monitoring.calibration import with_monitor_calibration
from persona_lens.serve.said import Made
from persona_lens.serve.server import Running
from persona_lens.serve.session import Session
from persona_lens.serve.shelf import Shelf
from persona_lens.serve.workbench import Workbench
from persona_lens.steering.history import DEFAULT_HISTORY
from persona_lens.vectors import PersonaVectors
from persona_lens.vectors.provenance import LayerBaseline, StoredBaseline, Tuned
from tests.backends.fixtures import backend_of
from tests.serve.browsing import DESK, PHONE, Page, browser
from tests.serve.running import LAYERS, TRAITS, Client, vectors_of
from tests.tiny import tiny_model

HOSTILE = '<img src=x onerror="document.body.dataset.owned=1"><script>document.body.dataset.owned=1</script>\u202e&amp;'


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def running(chromium: Any) -> Iterator[Running]:
    backend = backend_of("transformers", tiny_model())
    usual = {layer: LayerBaseline(0.1, 0.2, *[(0.0, 0.2)] * 4) for layer in LAYERS}
    baseline = StoredBaseline("response_mean", None, 2, 20, usual).to_json()
    vectors = [
        vectors_of(backend, trait, seed)
        .with_tuned(Tuned(1, 0.5), {"strength": 0.1, "cliff": 0.5})
        .with_provenance(baseline=baseline)
        for seed, trait in enumerate(TRAITS)
    ]
    vectors[1] = monitored(vectors[1])
    with Running(Workbench(backend, Shelf(backend, vectors, LAYERS))) as server:
        yield server


def monitored(vectors: PersonaVectors) -> PersonaVectors:
    """Vectors with what `monitor study` stores; at one layer it is told what speaks against it."""
    places = [number / 10 - 2 for number in range(40)]
    seen = Observations.of(places, [number // 8 for number in range(40)], [5] * 40, [n // 4 for n in range(40)])
    verdicts: dict[int, Verdict] = dict(zip(LAYERS, ("clear", "unclear"), strict=True))
    curves = [
        replace(calibrate(seen, vectors.trait, layer, "response_mean"), verdict=verdict)
        for layer, verdict in verdicts.items()
    ]
    return with_monitor_calibration(vectors, curves, LAYERS[0], {"judge": {"judge": "likelihood"}})


@pytest.fixture
def page(chromium: Any, running: Running) -> Iterator[Page]:
    context = chromium.new_context(viewport=DESK, accept_downloads=True)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened = Page(context, running.link)
    opened.set(Tokens_at_most=10, Temperature=1, Seed=3)
    yield opened
    assert not opened.faults
    context.close()


def test_a_reply_comes_coloured_and_says_what_it_was_made_with(page: Page) -> None:
    page.send("Hello")
    tokens = page.page.locator(".token")
    assert tokens.count() == 10
    shades = {tokens.nth(number).evaluate("span => getComputedStyle(span).backgroundColor") for number in range(10)}
    assert len(shades) > 3
    assert page.made() == ["not steered · temperature 1, top-p 1, seed 3"]
    assert "Before the reply: evil@1 at" in page.page.inner_text(".message.assistant .before")
    assert "its usual +0.100" in page.page.inner_text("#legend")
    before = tokens.nth(2).evaluate("span => getComputedStyle(span).backgroundColor")
    page.page.select_option("#gauge", "kind@2")
    assert tokens.nth(2).evaluate("span => getComputedStyle(span).backgroundColor") != before
    assert page.page.locator("#chart svg .band").count() == 2
    assert "Reply finished" in page.page.inner_text("#live")


def test_of_a_model_that_does_not_think_no_thinking_is_limited(page: Page, tmp_path: Path) -> None:
    labels = page.page.locator("#settings .grid label span").all_text_contents()
    assert labels == ["Temperature", "Top-p", "Tokens at most", "Seed"]
    session = Session("another")
    session.add("user", "Hello")
    session.add("assistant", "Hm.", made=Made(temperature=1.0, max_tokens=10, seed=3, thinking_budget=5))
    page.page.set_input_files("#file", session.save(tmp_path / "another.jsonl"))
    page.page.locator(".message.assistant").wait_for()
    page.act("Use its settings")
    page.act("Again")
    sampled = "not steered · temperature 1, top-p 1, seed 3"
    assert page.made() == [sampled]
    assert "2/2" in page.page.inner_text(".message.assistant .switch")
    page.act("Branch before")
    assert page.made() == [f"{sampled}, thinking up to 5 tokens"]


def test_a_token_shows_all_traits_and_layers_to_pointer_and_keyboard(page: Page) -> None:
    page.send("Hello")
    page.page.hover(".token[data-token='4']")
    tip = page.page.inner_text("#tip")
    assert all(word in tip for word in ("token 4", "evil", "kind", "layer 1", "layer 2", "SD"))
    page.page.focus(".token[data-token='0']")
    page.page.keyboard.press("ArrowRight")
    assert page.page.evaluate("document.activeElement.dataset.token") == "1"
    assert page.page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    assert "token 1" in page.page.inner_text("#tip")
    page.page.keyboard.press("Escape")
    assert page.page.is_hidden("#tip")


def test_what_is_set_in_the_rack_steers_the_next_reply_and_presets_keep_it(page: Page) -> None:
    slider = page.page.get_by_label("strength of evil", exact=True)
    slider.fill("50")
    assert page.page.input_value("#line") == "evil@1:+50%"
    assert page.page.is_checked("#trait-evil")
    page.send("Hello")
    assert page.made() == ["evil@1:+50% · temperature 1, top-p 1, seed 3"]
    page.page.fill("[aria-label='Name of a new preset']", "dark")
    page.page.get_by_role("button", name="Save preset").click()
    page.page.wait_for_selector("[aria-label=Presets] option[value=dark]", state="attached")
    page.page.get_by_role("button", name="All off").click()
    assert page.page.input_value("#line") == ""
    page.page.select_option("[aria-label=Presets]", "dark")
    page.page.get_by_role("button", name="Load", exact=True).click()
    assert page.page.input_value("#line") == "evil@1:+50%"
    page.page.get_by_role("button", name="Delete", exact=True).click()
    page.page.wait_for_selector("[aria-label=Presets] option[value=dark]", state="detached")


@pytest.mark.parametrize("tone", ["light", "dark"])
def test_what_was_tuned_and_where_text_breaks_are_marked_where_the_slider_has_them(page: Page, tone: Any) -> None:
    page.page.emulate_media(color_scheme=tone)
    trait = page.page.locator(".trait").first
    slider = trait.get_by_role("slider")
    assert slider.input_value() == "10"  # what was tuned
    assert trait.locator(".marks p").inner_text() == "tuned +10% · text breaks at +50%"
    box = slider.bounding_box()
    ends = [float(slider.get_attribute(name)) for name in ("min", "max")]
    shades = set()
    for kind, at in (("zero", 0), ("tuned", 10), ("cliff", 50)):
        mark = trait.locator(f".mark.{kind}")
        share = (at - ends[0]) / (ends[1] - ends[0])
        assert mark.bounding_box()["x"] == pytest.approx(box["x"] + 8 + share * (box["width"] - 16), abs=1.5)
        shades.add(mark.evaluate("mark => getComputedStyle(mark).borderLeftColor"))
    assert len(shades) == 3
    words = trait.locator(".marks p .cliff").evaluate("word => getComputedStyle(word).color")
    assert words == {"light": "rgb(160, 64, 0)", "dark": "rgb(255, 171, 112)"}[tone]
    trait.get_by_label("operation of evil").select_option("times")
    assert trait.locator(".marks p").inner_text() == "tuned +0.5"
    assert trait.locator(".mark.cliff").count() == 0


def test_a_stored_monitor_foretells_the_reply_and_says_what_speaks_against_it(page: Page, running: Running) -> None:
    page.send("Hello")
    said = page.page.inner_text(".message.assistant .before")
    read = Client(running).chat("Hello", lens={"watch": ["kind"]}).json()["choices"][0]["persona_lens"]
    kind = running.server.workbench.shelf.vectors["kind"]
    curves = [monitor_calibration(kind, layer) for layer in LAYERS]
    shares = [curve.probability(value) for curve, value in zip(curves, read["prompt_last"], strict=True)]
    first, second = (
        f"{round(100 * share)}% likely to be kind, by layer {at}" for at, share in zip(LAYERS, shares, strict=True)
    )
    assert said.endswith(f" · {first} · {second} ({curves[1].caveat})")
    assert "did not clearly do better than random directions" in said
    assert page.page.locator(".before [title]").count() == 0  # nothing of it is for pointers alone


def test_a_steering_can_be_written_and_what_is_wrong_with_it_is_said(page: Page) -> None:
    page.page.fill("#line", "kind@all:ablate(0.5) on response if evil@2>3, evil@1:increments(+1)")
    page.page.press("#line", "Enter")
    assert page.page.is_checked("#trait-kind")
    assert page.page.input_value("[aria-label='operation of kind']") == "ablate"
    assert page.page.input_value("[aria-label='tokens of kind']") == "response"
    assert page.page.inner_text(".extras code") == "evil@1:increments(+1)"
    page.page.fill("#line", "nobody@1:+3")
    page.page.press("#line", "Enter")
    page.page.locator("#fault").get_by_text("nobody").wait_for()
    page.send("Hello")
    assert "nobody" in page.page.inner_text("#notices")
    assert page.replies() == []


def test_earlier_turns_are_found_clean_if_that_is_chosen_and_copies_carry_it(page: Page) -> None:
    earlier = page.page.get_by_label("Earlier turns", exact=True)
    assert earlier.input_value() == DEFAULT_HISTORY
    page.page.get_by_label("strength of evil", exact=True).fill("40")
    page.page.select_option("[aria-label='tokens of evil']", "generating")
    page.send("Hello")
    earlier.select_option("clean")
    page.send("And now?")
    steered = "evil@1:+40% on generating"
    sampled = "temperature 1, top-p 1, seed 3"
    assert page.made() == [f"{steered} · {sampled}", f"{steered}, clean history · {sampled}"]
    assert page.copied("--edits", 0) == f"--edits '{steered}'"
    assert page.copied("--edits") == f"--edits '{steered}' --history clean"
    assert '"history":"clean"' in page.copied("Python").replace(" ", "")
    assert '"history":"clean"' in page.copied("curl")
    earlier.select_option("steered")
    page.act("Again")
    assert page.made()[-1] == f"{steered}, steered history · {sampled}"
    page.act("Branch before")
    page.act("Use its settings")
    assert earlier.input_value() == "clean"
    page.page.reload()
    page.ready()
    assert earlier.input_value() == "clean"
    assert page.made()[-1] == f"{steered}, clean history · {sampled}"
    page.page.fill("#line", "evil@1:+1 schedule(0:1 9:0)")
    page.page.press("#line", "Enter")
    page.page.locator("#fault").get_by_text("from the beginning of the conversation").wait_for()
    page.page.get_by_role("button", name="All off").click()
    page.send("Then?")
    assert page.made()[-1] == f"not steered · {sampled}"


def test_two_settings_answer_side_by_side_with_the_same_seed(page: Page) -> None:
    page.page.get_by_label("strength of evil", exact=True).fill("60")
    page.page.check("#compare")
    page.send("Hello")
    one, other = page.made()
    assert (one, other) == (
        "not steered · temperature 1, top-p 1, seed 3",
        "evil@1:+60% · temperature 1, top-p 1, seed 3",
    )
    assert page.page.locator(".pair .token.parts").count() in (0, 2)
    page.act("One alone")
    assert len(page.replies()) == 1


def test_branches_are_kept_and_switched_and_messages_edited(page: Page) -> None:
    page.send("Hello")
    first = page.replies()
    page.act("Another seed")
    second = page.replies()
    assert second != first
    page.act("Branch before")
    assert page.replies() == first
    assert "1/2" in page.page.inner_text(".message.assistant .switch")
    page.page.locator(".message.user").get_by_role("button", name="Edit").click()
    page.page.get_by_label("Edit: You").fill("Good evening")
    page.page.get_by_role("button", name="Save and answer").click()
    page.page.wait_for_timeout(50)
    page.settled()
    assert page.page.inner_text(".message.user .text") == "Good evening"
    page.page.locator(".message.user").get_by_role("button", name="Branch before").click()
    assert page.page.inner_text(".message.user .text") == "Hello"
    assert page.replies() == first


def test_the_tree_and_what_is_set_survive_a_reload(page: Page) -> None:
    page.page.get_by_label("strength of kind", exact=True).fill("-20")
    page.send("Hello")
    page.act("Again")
    replies, made = page.replies(), page.made()
    page.page.reload()
    page.ready()
    assert (page.replies(), page.made()) == (replies, made)
    assert page.page.input_value("#line") == "kind@1:-20%"
    assert page.page.locator(".token").count() == 10
    assert "2/2" in page.page.inner_text(".message.assistant .switch")


def test_what_no_longer_fits_the_browser_is_said(page: Page) -> None:
    page.page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }; }"
    )
    page.send("Hello")
    page.page.wait_for_selector("#notices .alert")
    assert "too long for the browser to keep" in page.page.inner_text("#notices")


def test_a_session_is_saved_opened_and_exported(page: Page, tmp_path: Path) -> None:
    def saved(button: str) -> Path:
        page.page.click("#saving summary")
        with page.page.expect_download() as download:
            page.page.click(button)
        file: Path = tmp_path / download.value.suggested_filename
        download.value.save_as(file)
        return file

    page.page.locator("#system").fill("Be brief.")
    page.send("Hello")
    page.act("Another seed")
    replies = page.replies()
    session = Session.load(saved("#save"))
    assert [message.role for message in session.path] == ["system", "user", "assistant"]
    assert len(session) == 4
    assert session.path[-1].readings is not None
    assert 1 <= len(session.path[-1].readings.tokens) <= 10  # any seed, and the model may end by itself
    plain = [json.loads(line) for line in saved("#save-messages").read_text().splitlines()]
    assert plain == session.messages
    assert "Be brief." in saved("#export").read_text()
    page.page.click("#new")
    page.page.set_input_files("#file", tmp_path / "conversation.jsonl")
    page.page.wait_for_selector(".token")
    assert page.replies() == replies
    page.page.set_input_files("#file", tmp_path / "messages.jsonl")
    page.page.get_by_role("button", name="Read the traits").click()
    page.page.wait_for_selector(".token")
    page.page.set_input_files("#file", {"name": "x.jsonl", "mimeType": "", "buffer": b"neither"})
    page.page.get_by_text("not JSON").wait_for()


def test_settings_are_copied_for_others(page: Page) -> None:
    page.page.get_by_label("strength of evil", exact=True).fill("7")
    page.send("It's")
    assert page.copied("--edits") == "--edits 'evil@1:+7%'"
    python = page.copied("Python")
    compile(python, "copied", "exec")
    assert "evil@1:+7%" in python
    assert "It'\\''s" in page.copied("curl")


def test_the_keyboard_alone_is_enough(page: Page) -> None:
    keyboard = page.page.keyboard
    page.page.focus(".skip")
    keyboard.press("Enter")
    keyboard.type("Hello")
    keyboard.press("Enter")
    page.page.wait_for_selector(".token")
    page.settled()
    page.page.focus("#trait-evil")
    keyboard.press("Space")
    keyboard.press("Tab")
    keyboard.press("Tab")
    keyboard.press("ArrowRight")
    assert page.page.input_value("#line") == "evil@1:+11%"
    unnamed = """[...document.querySelectorAll('button, input, select, textarea')].filter(each => each.offsetParent
        && !each.textContent.trim() && !each.getAttribute('aria-label') && !each.labels?.length).length"""
    assert page.page.evaluate(unnamed) == 0


def test_the_page_fits_a_phone(page: Page) -> None:
    page.page.set_viewport_size(PHONE)
    page.page.check("#compare")
    page.send("Hello, " + "w" * 200)
    wide = "document.documentElement.scrollWidth > innerWidth"
    assert not page.page.evaluate(wide)
    page.page.click("#show-rack")
    assert page.page.is_visible("#trait-evil")
    assert page.page.is_hidden("#composer")
    assert not page.page.evaluate(wide)
    page.page.click("#hide-rack")
    assert page.page.is_visible("#composer")


def test_text_of_others_is_never_markup(page: Page) -> None:
    page.send(HOSTILE)
    line = {"role": "assistant", "content": HOSTILE}
    header = {"persona_lens": "session", "format_version": 1, "model": HOSTILE, "gauges": [], "current": "m0"}
    message = {"id": "m0", "parent": None, **line, "made": {"edits": HOSTILE, "temperature": 0}}
    text = "\n".join(map(json.dumps, (header, message)))
    assert "<img src=x" in page.page.inner_text(".message.user .text")
    page.page.set_input_files("#file", {"name": "x.jsonl", "mimeType": "", "buffer": text.encode()})
    page.page.locator(".message.user").wait_for(state="detached")
    assert "<script>" in page.page.inner_text(".message.assistant .text")
    assert page.page.locator("#messages img, #messages script").count() == 0
    assert page.page.evaluate("document.body.dataset.owned") is None


def test_a_reply_is_stopped_and_what_came_is_kept(page: Page) -> None:
    page.set(Tokens_at_most=450)
    page.page.fill("#message", "Hello")
    page.page.press("#message", "Enter")
    page.page.wait_for_selector(".token")
    page.page.click("#stop")
    page.settled()
    assert "Stopped." in page.page.inner_text(".message.assistant .note")
    assert 0 < page.page.locator(".token").count() < 450


def test_alarms_are_marked(page: Page) -> None:
    page.page.get_by_label("Alarms", exact=True).fill("evil@1>-50")
    page.send("Hello")
    assert "▲ evil@1>-50" in page.page.inner_text(".means")
    assert page.page.locator("#chart .alarm-mark").count() == 1


def chunks(*values: dict[str, Any]) -> str:
    return "".join(f"data: {json.dumps(value)}\n\n" for value in values)


def test_a_busy_server_is_asked_again_and_a_cut_stream_keeps_what_came(page: Page) -> None:
    asked = []

    def answered(route: Any) -> None:
        asked.append(json.loads(route.request.post_data))
        if len(asked) == 1:
            error = {"error": {"message": "too many requests wait; try again"}}
            route.fulfill(status=429, headers={"Retry-After": "1"}, body=json.dumps(error))
            return
        told = {
            "gauges": [{"name": "evil@1", "trait": "evil", "layer": 1}],
            "prompt_last": [0.5],
            "seed": 3,
            "edits": "",
        }
        told["forecast"] = [{"gauge": 0, "probability": 0.31, "says": "from few prompts"}]
        token = {"tokens": [{"id": 5, "text": "Half", "values": [0.2]}]}
        head = {"choices": [{"delta": {"role": "assistant"}}], "persona_lens": told}
        body = chunks(head, {"choices": [{"delta": {"content": "Half"}}], "persona_lens": token})
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.page.route("**/v1/chat/completions", answered)
    page.send("Hello")
    assert len(asked) == 2
    assert page.replies() == ["Half"]
    assert "connection was cut" in page.page.inner_text(".message.assistant .note")
    assert "31% likely to be evil" in page.page.inner_text(".message.assistant .before")


def test_a_server_that_is_gone_is_said_and_what_was_written_is_kept(page: Page) -> None:
    page.page.route("**/v1/chat/completions", lambda route: route.abort())
    page.send("Hello")
    assert "does not answer" in page.page.inner_text("#notices")
    page.page.unroute("**/v1/chat/completions")
    page.page.get_by_role("button", name="Try again").click()
    page.page.wait_for_selector(".token")
    page.settled()
    assert len(page.replies()) == 1
