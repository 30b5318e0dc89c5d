"""Text of others in terminals, pages and figures: one nasty string through everything that prints or draws."""

from __future__ import annotations

import ast
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.columns import Columns
from rich.panel import Panel
from rich.text import Text

from persona_lens.cli import display, main
from persona_lens.core.text import END_ISOLATE, ISOLATE, escaped, in_short, isolated, printable
from persona_lens.reports.page import environment
from persona_lens.reports.svg import drawing_style, to_svg

SOURCES = Path(__file__).parents[2] / "persona_lens"
NASTY = "\x1b]0;owned\x07\x1b[2J[/x][red]:smile:\x00\x9b31m\u202eevil\u2066\U000e0041\ud800<script>&\r"
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2060-\u2066\ud800-\udfff\U000e0000-\U000e007f]")
HEBREW = "שלום"


def harmless(shown: str, *, colours: bool = False) -> None:
    """Nothing in it acts, and the markup that was in the text is still to be read."""
    if colours:
        shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", shown)  # the console's own
    assert not ACTS.search(shown), ascii(ACTS.search(shown))
    flat = re.sub(r"\s|[│┃|]", "", shown)
    assert "[/x][red]:smile:" in flat


def test_what_is_printed_shows_the_text_and_does_not_act(capsys: pytest.CaptureFixture[str]) -> None:
    display.say(NASTY)
    display.say(NASTY, err=True, fg="red")
    display.print_table(NASTY, ("", NASTY), [(NASTY, NASTY)])
    display.console().print(Columns([Panel(NASTY, title=Text(NASTY))]))
    display.show_status(NASTY)
    with display.showing_progress() as report:
        report(1, 2, NASTY)
    for shown in capsys.readouterr():
        harmless(shown)


def test_so_it_is_in_a_terminal_with_colours() -> None:
    screen = io.StringIO()
    console = display.console(file=screen, force_terminal=True, width=300)
    console.print(Panel(NASTY, title=Text(NASTY), style="red"))
    with display.showing_progress(screen=console) as report:
        report(1, 2, NASTY)
    harmless(screen.getvalue(), colours=True)


def test_json_has_the_same_values_and_nothing_that_acts(capsys: pytest.CaptureFixture[str]) -> None:
    display.say_json({NASTY: [NASTY, HEBREW]})
    shown = capsys.readouterr().out
    assert json.loads(shown) == {NASTY: [NASTY, HEBREW]}
    assert not ACTS.search(shown)
    assert HEBREW in shown
    assert json.loads(escaped(json.dumps("\U000e0041\x7f", ensure_ascii=False))) == "\U000e0041\x7f"


def test_only_one_module_prints() -> None:
    """Whoever prints by other means prints what others wrote without a look at it."""
    found = []
    for file in sorted((SOURCES / "cli").glob("*.py")):
        if file.name == "display.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in (
                "print",
                "typer.echo",
                "typer.secho",
                "click.echo",
                "Console",
                "sys.stdout.write",
                "rich.print",
            ):
                found.append(f"{file.name}: {name}; take say, say_json, console or print_table")
    assert not found


def test_only_one_module_makes_pages_and_one_figures() -> None:
    makers = {"Environment(": set[str](), "savefig(": set[str]()}
    for file in SOURCES.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for call, places in makers.items():
            if re.search(rf"(?<![a-z]){re.escape(call)}", text):
                places.add(file.relative_to(SOURCES).as_posix())
    # The heat map and the card of the hub have templates of their own, with `printable` in them; and models' templates.
    assert makers["savefig("] == {"reports/svg.py"}
    assert makers["Environment("] <= {"reports/page.py", "monitoring/markup.py", "vectors/hub.py"}


def of_vectors(folder: Path) -> list[str]:
    from tests.vectors.formats.files import INFO, vectors  # torch, which the other tests here do without

    made = vectors()
    type(made)(NASTY.replace("\ud800", ""), INFO, made.directions, {"kind": NASTY[:-12]}).save(folder / "v.safetensors")
    return ["vectors", "show", str(folder / "v.safetensors")]


def of_cosines(folder: Path) -> list[str]:
    from tests.vectors.formats.files import vectors

    of_vectors(folder)
    vectors().save(folder / "w.safetensors")
    return ["vectors", "cosines", str(folder / "v.safetensors"), str(folder / "w.safetensors"), "--layer", "1"]


def of_scores(folder: Path) -> list[str]:
    (folder / "a.csv").write_text(f'"{NASTY[:-12]}",response\nq,r\n', encoding="utf-8")
    return ["judge", "compare", str(folder / "a.csv"), str(folder / "a.csv")]


def of_conversations(folder: Path) -> list[str]:
    row = {"messages": [{"role": NASTY[:-12], "content": "x"}]}
    (folder / "t.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return [
        "monitor",
        "transcript",
        "smollm2-135m",
        of_vectors(folder)[-1],
        str(folder / "t.jsonl"),
        "--form",
        NASTY[:-12],
    ]


def of_traits(folder: Path) -> list[str]:
    (folder / "evil.yaml").write_text(f"name: '{NASTY[12:30]}'\n[/x][red]:smile:", encoding="utf-8", newline="")
    return ["traits", "check", str(folder / "evil.yaml"), NASTY[:-12]]


def of_steering(folder: Path) -> list[str]:
    return ["generate", "smollm2-135m", of_vectors(folder)[-1], "Hi", "--edits", "x@1:+1, [/x][red]:smile:" + NASTY]


@pytest.mark.parametrize("make", [of_vectors, of_cosines, of_scores, of_conversations, of_traits, of_steering])
def test_commands_show_what_files_hold(
    make: Callable[[Path], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["persona-lens", *make(tmp_path)])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        main()
    written = capsys.readouterr()
    harmless(written.out + written.err)


@pytest.mark.parametrize(
    "arguments",
    [
        ["traits", "show", "--x" + NASTY],
        ["traits", "show", "optimistic", NASTY],
        ["traits", NASTY],
        [NASTY],
        ["steer", "tune", "m", "v", NASTY],
    ],
)
def test_what_was_typed_wrong_is_quoted_harmlessly(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["persona-lens", *arguments])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    harmless(capsys.readouterr().err)


@pytest.mark.parametrize("error", [None, OSError(5, "broken", NASTY), KeyError(NASTY), RuntimeError(NASTY)])
def test_tracebacks_are_harmless(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that are asked for, and those of bugs."""

    def failing(_: object) -> None:
        raise error or AssertionError

    if error is not None:
        monkeypatch.setattr("persona_lens.cli.app", failing)
    asked = ["--debug"] if error is None or isinstance(error, OSError) else []
    monkeypatch.setattr(sys, "argv", ["persona-lens", *asked, "traits", "show", NASTY])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    harmless(shown)


def test_figures_are_whole_whatever_their_labels_say() -> None:
    from matplotlib.figure import Figure

    with drawing_style():
        figure = Figure(figsize=(4, 3))
        axes = figure.subplots()
        axes.plot([0, 1], [1, 2], label=NASTY)
        axes.set_xticks([0, 1], [NASTY, HEBREW])
        axes.set_title("x" * 100_000)
        figure.legend()
        made = to_svg(figure, "f")
    root = ElementTree.fromstring(made)
    texts = [text for element in root.iter() for text in [element.text or ""] if text.strip()]
    assert not ACTS.search(made)
    assert sum("[/x][red]:smile:" in text for text in texts) >= 2
    assert f"{ISOLATE}{HEBREW}{END_ISOLATE}" in texts
    assert max(map(len, texts)) < 1000


def test_pages_show_text_and_keep_its_direction_to_itself() -> None:
    page = environment().from_string("<p title='{{ it }}'>{{ it }}</p><p dir='auto'>{{ other | text }}</p>")
    shown = page.render(it=NASTY + HEBREW, other=HEBREW + "<b>")
    assert not ACTS.search(shown)
    assert "<script>" not in shown
    assert shown.count(ISOLATE) == shown.count(END_ISOLATE) == 2
    assert f"<p dir='auto'>{HEBREW}&lt;b&gt;</p>" in shown
    assert len(page.render(it="x" * 10**7, other="")) < 200_000


def test_short_forms_are_short_at_once() -> None:
    assert in_short("a \n b\x1b" + "c" * 100, 10) == "a b␛ccccc…"
    assert len(in_short("[" * 10**7)) == 60
    assert isolated("abc é") == "abc é"
    assert printable("a\u00adb\ufe00\U000e0100\U0001fffe") == "a[U+00AD]b[U+FE00][U+E0100][U+1FFFE]"
