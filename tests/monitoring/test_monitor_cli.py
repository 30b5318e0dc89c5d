"""The commands of ``persona-lens monitor``, on a tiny random model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from persona_lens import PersonaLensError, open_backend
from persona_lens.cli import app
from persona_lens.judging import Calibration
from persona_lens.models.chat import chat_format
from persona_lens.monitoring import ConversationMonitor, Panel, monitor_calibration, prompt_projections, threshold_for
from persona_lens.monitoring.calibration import calibrate, with_monitor_calibration
from persona_lens.monitoring.prediction import Observations
from persona_lens.reports.study import title
from persona_lens.serve.said import Made
from persona_lens.serve.session import Session
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors, load_vectors
from tests.tiny import D_MODEL, N_LAYERS, saved_model

TRAIT = load_trait("optimistic")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return saved_model(folder, positions=2048)


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors without a calibration, the extraction's responses and scores beside them."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    rows = torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(0)) * 3
    provenance = {
        "trait": {"content_hash": TRAIT.content_hash(), **TRAIT.model_dump(mode="json")},
        "judge": {"calibration": Calibration(40.0, 0.0).to_json()},
        "settings": {"rollouts": {"max_new_tokens": 5, "temperature": 0.9}},
    }
    info = open_backend("transformers", str(model), dtype="float32").info
    PersonaVectors("optimistic", info, {"response_mean": rows}, provenance).save(folder / "vectors.safetensors")
    asked = [(q, arm) for q in range(3) for arm in ("positive", "negative")]
    rollouts = [
        {"row": row, "question_number": q, "arm": arm, "question": f"Q{q}?", "response": f"A{q} {arm}."}
        for row, (q, arm) in enumerate(asked)
    ]
    for name, written in (("rollouts", rollouts), ("scores", [{"row": i, "score": 60 + i} for i in range(6)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    return folder


@pytest.fixture(scope="module")
def calibrated(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    vectors = load_vectors(plain)
    x = [float(i) for i in range(-20, 20)]
    observed = Observations.of(x, [int(v > 0) for v in x], [1] * 40, [i % 5 for i in range(40)])
    found = with_monitor_calibration(vectors, [calibrate(observed, "optimistic", 1, "response_mean")], 1, {})
    return found.save(tmp_path_factory.mktemp("kept") / "kept.safetensors")


def run(*arguments: object) -> Any:
    done = CliRunner().invoke(app, ["monitor", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done


def parsed(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


SMALL = ("--dtype", "float32", "--questions", 3, "--samples", 2, "--random-directions", 2)


def test_a_study_fills_a_folder_that_prompt_can_use(model: Path, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    found = parsed("study", model, plain, *SMALL, "--out", out)
    assert found["folder"] == str(out)
    assert found["counts"]["responses"] == 3 * 2 * 8
    assert (found["settings"]["rollouts"]["max_new_tokens"], found["settings"]["rollouts"]["temperature"]) == (5, 0.9)
    assert {"report.html", "summary.json", "study-scores.jsonl", "vectors.safetensors"} <= {
        p.name for p in out.iterdir()
    }
    assert len((out / "study-scores.jsonl").read_text().splitlines()) == 48
    shown = run("study", model, plain, *SMALL, "--out", out).stdout
    said = title(json.loads((out / "summary.json").read_text()))
    for part in ("prompt 8", "Pearson", "no predictor can reach more than", "only 3 questions", "report:", said):
        assert part in " ".join(shown.split())


def test_a_dry_run_says_what_is_asked_and_makes_nothing(model: Path, plain: Path, tmp_path: Path) -> None:
    planned = parsed("study", model, plain, *SMALL, "--conditions", "both", "--shots", "0,1,3", "--dry-run")["work"]
    assert planned[0]["rows"] == 3 * 2 * (8 + 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shots", "0,5"), "for --conditions shots or both"),
        (("--conditions", "all"), "--conditions takes prompts, shots, both; got 'all'"),
        (("--conditions", "shots", "--shots", "0,1.5"), "--shots takes whole numbers"),
        (("--conditions", "shots"), "20 examples are asked for, but there are 3"),
        (("--conditions", "shots", "--examples", "/nowhere"), r"there is no /nowhere/rollouts\.jsonl"),
        (("--layers", "7"), "layer 7 does not exist"),
    ],
)
def test_what_cannot_be_studied(model: Path, plain: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(PersonaLensError, match=message):
        run("study", model, plain, "--dtype", "float32", *arguments, "--out", "/nowhere/run")


def test_a_prompt_is_projected_and_judged_before_it_is_answered(model: Path, plain: Path, calibrated: Path) -> None:
    found = parsed(
        "prompt", model, calibrated, "Will it rain?", "--system", "Be gloomy.", "--dtype", "float32",
        "--false-alarm-rate", "0.1",
    )  # fmt: skip
    ((row,),) = [each["traits"] for each in found["prompts"]]
    backend, vectors = open_backend("transformers", str(model), dtype="float32"), load_vectors(calibrated)
    prompt = chat_format(backend).encode("Be gloomy.", "Will it rain?")
    expected = float(prompt_projections(backend, [prompt], [vectors], [1])[0, 0, 0])
    calibration = monitor_calibration(vectors)
    threshold = threshold_for(calibration, 0.1)
    assert row["projection"] == pytest.approx(expected, abs=1e-4)
    assert row["probability"] == pytest.approx(calibration.probability(expected), abs=1e-4)
    assert row["threshold"]["value"] == threshold.value
    assert row["alarm"] == (expected >= threshold.value)
    assert row["caveat"] == calibration.caveat
    assert "was not held against random directions" in row["caveat"]
    said = run("prompt", model, calibrated, "Will it rain?", "--dtype", "float32", "--false-alarm-rate", "0.1")
    assert "note: the projection on optimistic at layer 1 was not held against" in " ".join(said.stderr.split())
    shown = said.stdout
    assert "optimistic@1" in shown
    assert "rate of 10%" in " ".join(shown.split())
    # Several traits at once, each where it belongs; there is no calibration at layer 0.
    both = parsed("prompt", model, calibrated, plain, "Will it rain?", "--layer", "0", "--dtype", "float32")
    assert [each["probability"] for each in both["prompts"][0]["traits"]] == [None, None]
    one, other = (each["projection"] for each in both["prompts"][0]["traits"])
    assert one == pytest.approx(other, rel=1e-5)


def test_prompts_come_from_a_file(model: Path, calibrated: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    talks = [
        [{"role": "user", "content": "One?"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two?"},
         {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Three [3]?"}],
    ]  # fmt: skip
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    found = parsed("prompt", model, calibrated, "--file", file, "--dtype", "float32")["prompts"]
    assert [each["prompt"] for each in found] == ["One?", "Three [3]?"]
    assert "[3]" in run("prompt", model, calibrated, "--file", file, "--dtype", "float32").stdout
    assert found[0]["traits"][0]["projection"] != found[1]["traits"][0]["projection"]
    file.write_text(json.dumps({"messages": [*talks[0], {"role": "assistant", "content": "Done."}]}) + "\n")
    with pytest.raises(PersonaLensError, match=r"prompts\.jsonl:1: the conversation must end with the user"):
        run("prompt", model, calibrated, "--file", file, "--dtype", "float32")
    file.write_text('{"messages": 5}\n')
    with pytest.raises(PersonaLensError, match=r"prompts\.jsonl:1"):
        run("prompt", model, calibrated, "--file", file, "--dtype", "float32")


def test_what_cannot_be_asked_of_a_prompt(model: Path, plain: Path, calibrated: Path, tmp_path: Path) -> None:
    with pytest.raises(PersonaLensError, match=r"give vectors and then the user's message"):
        run("prompt", model, calibrated)
    with pytest.raises(PersonaLensError, match=r"neither calibrated .* nor tuned; name a layer"):
        run("prompt", model, plain, "Hello?")
    with pytest.raises(PersonaLensError, match=r"--false-alarm-rate needs a calibration"):
        run("prompt", model, plain, "Hello?", "--layer", "1", "--false-alarm-rate", "0.1")
    with pytest.raises(PersonaLensError, match="above 0 and below 1"):
        run("prompt", model, calibrated, "Hello?", "--false-alarm-rate", "10")
    with pytest.raises(PersonaLensError, match="--system goes with a message"):
        run("prompt", model, calibrated, "--system", "x", "--file", tmp_path / "prompts.jsonl")
    with pytest.raises(PersonaLensError, match="layer 9 does not exist"):
        run("prompt", model, plain, "Hello?", "--layer", "9")


def chat(*arguments: object, said: str = "Hello\n\nAnd now?\n") -> Any:
    done = CliRunner().invoke(
        app, ["monitor", "chat", *map(str, arguments), "--dtype", "float32", "--max-new-tokens", "6"], input=said
    )
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_a_chat_is_read_turn_by_turn_and_alarms_sound(model: Path, plain: Path) -> None:
    spoken = chat(model, plain, "--layers", "0,1", "--system", "Be brief.", "--json")
    turns = [json.loads(line) for line in spoken.stdout.splitlines()]
    assert [turn["turn"] for turn in turns] == [0, 1]
    backend, vectors = open_backend("transformers", str(model), dtype="float32"), load_vectors(plain)
    monitor = ConversationMonitor(backend, Panel.of(vectors, [0, 1]), system="Be brief.")
    for turn, message in zip(turns, ("Hello", "And now?"), strict=True):
        expected = monitor.reply(message, max_new_tokens=6)
        assert turn["text"] == expected.text
        for row, reading in zip(turn["readings"], expected.readings, strict=True):
            assert (row["trait"], row["layer"]) == (reading.trait, reading.layer)
            assert row["mean"] == pytest.approx(reading.mean, abs=1e-4)
    highest = max(row["highest"] for row in turns[0]["readings"] if row["layer"] == 1)
    warned = chat(model, plain, "--layers", "1", "--system", "Be brief.", "--alarm", f"optimistic>{highest - 0.01:.4f}",
                  "--stop", "--show", said="Hello\n")  # fmt: skip
    assert "ALARM optimistic@1" in warned.stderr
    assert "ended by an alarm" in " ".join(warned.stdout.split())
    assert "each token with its value" in warned.stdout
    assert "ALARM" not in chat(model, plain, "--layers", "1", "--alarm", "optimistic>1e6").stderr


def test_an_alarm_counts_from_a_baseline_that_one_command_measures(model: Path, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "baseline"
    small = ("baseline", model, plain, "--dtype", "float32", "--questions", 1, "--neutral", 3, "--out", out)
    assert parsed(*small, "--dry-run")["work"][0]["rows"] == 4
    said = " ".join(run(*small).stdout.split())
    assert "4 neutral answers" in said
    assert "SD of tokens" in said
    warned = chat(
        model, out, "--layers", "1", "--alarm", "optimistic>-9sd", "--system", "Be brief.", said="Hello\n"
    ).stderr
    assert "alarm optimistic>-9sd: above " in warned
    assert "it rests on only 4 neutral answers" in warned
    assert "was measured under another system prompt" in warned
    assert "SD) > -9sd at token 0" in warned
    assert "ALARM" not in chat(model, out, "--layers", "1", "--alarm", "optimistic>99sd", said="Hello\n").stderr


def test_a_chat_can_be_steered(model: Path, plain: Path) -> None:
    def mean(*edits: str) -> float:
        said = chat(model, plain, "--layers", "1", "--json", *edits, said="Hello\n").stdout
        return float(json.loads(said)["readings"][0]["mean"])

    assert mean("--edits", "optimistic@1:affine(3)") == pytest.approx(3, abs=1e-3)
    assert mean() != pytest.approx(3, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--alarm", "optimistic"), "an alarm is written evil>3 .*; got 'optimistic'"),
        (("--alarm", "optimistic>2sd"), "carry no such baseline; measure it once with `persona-lens monitor baseline"),
        (("--alarm", "evil>3"), "evil"),
        (("--alarm", "optimistic>3", "--alarm-on", "word"), "--alarm-on takes prompt_last, token, running_mean"),
        (("--history", "washed"), "a history is steered or clean; got 'washed'"),
        (("--edits", "optimistic@1:+1", "--edits", "optimistic@1:+2"), "put the terms into one --edits"),
    ],
)
def test_what_a_chat_refuses(model: Path, plain: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(PersonaLensError, match=message):
        chat(model, plain, "--layers", "1", *arguments)


def test_a_chat_is_kept_and_gone_on_with(model: Path, plain: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    first = chat(model, plain, "--layers", "1", "--system", "Be brief.", "--save", file, "--json")
    session = Session.load(file)
    assert [each.role for each in session.path] == ["system", "user", "assistant", "user", "assistant"]
    assert session.path[-1].content == json.loads(first.stdout.splitlines()[-1])["text"]
    made, read = session.path[-1].made, session.path[-1].readings
    assert made == Made(max_tokens=6, seed=1)
    assert read is not None
    assert len(read.tokens) == json.loads(first.stdout.splitlines()[-1])["readings"][0]["tokens"]
    assert "".join(token.text for token in read.tokens).strip() == session.path[-1].content.strip()
    with pytest.raises(PersonaLensError, match=r"talk\.jsonl is already there"):
        chat(model, plain, "--layers", "1", "--save", file)
    with pytest.raises(PersonaLensError, match="a system prompt begins a conversation"):
        chat(model, plain, "--layers", "1", "--load", file, "--system", "x")
    more = chat(model, plain, "--layers", "1", "--load", file, "--save", file, "--json", said="More\n")
    assert json.loads(more.stdout)["turn"] == 2
    whole = chat(model, plain, "--layers", "1", "--system", "Be brief.", "--json", said="Hello\nAnd now?\nMore\n")
    assert json.loads(more.stdout)["text"] == json.loads(whole.stdout.splitlines()[-1])["text"]
    assert len(Session.load(file)) == 7
    # A question that nobody has answered is answered first.
    file.write_text(json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]))
    asked = chat(model, plain, "--layers", "1", "--load", file, "--json", said="")
    assert json.loads(asked.stdout)["text"] == json.loads(first.stdout.splitlines()[0])["text"]


def test_a_chat_finds_earlier_turns_steered_or_clean(model: Path, plain: Path, tmp_path: Path) -> None:
    file, typed = tmp_path / "talk.jsonl", "Hello\n/history\nAnd now?\n/history steered\n/again\n/history new\n"
    how = ("--edits", "optimistic@1:+9 on generating", "--history", "clean", "--save", file, "--json")
    done = chat(model, plain, "--layers", "1", *how, said=typed)
    said = " ".join(done.stderr.split())
    for part in ("history: clean", "history: steered", "error: a history is steered or clean; got 'new'"):
        assert part in said
    made = [each.made for each in Session.load(file) if each.made is not None]
    assert [each.history for each in made] == [None, "clean", "steered"]


def test_what_is_typed_into_a_chat_beside_messages(model: Path, plain: Path, tmp_path: Path) -> None:
    file = tmp_path / "typed.jsonl"
    typed = [
        "/again", "/help", "/nothing", "Hello", "/edits optimistic@1:affine(3)", "/again", "/again 7", "/again x",
        "/edits", "/edits nonsense@", "/edits off", "/back", "//slash", "/branches", "/branches 1", "/branches 9",
        "/save", f"/save {file}", f"/save {file}", f"/save {plain / 'rollouts.jsonl'}",
    ]  # fmt: skip
    done = chat(model, plain, "--layers", "1", "--temperature", "1", "--json", said="\n".join(typed) + "\n")
    turns = [json.loads(line) for line in done.stdout.splitlines()]
    assert [turn["turn"] for turn in turns] == [0, 0, 0, 0]
    assert [turn["readings"][0]["mean"] == pytest.approx(3, abs=1e-3) for turn in turns] == [False, True, True, False]
    said = " ".join(done.stderr.split())
    for part in (
        "nothing has been said that could be answered again", "/edits NOTATION|off", "there is no /nothing",
        "/again takes a seed, a whole number; got 'x'", "edits: optimistic@1:affine(3)", "edits: none",
        "back to before: Hello", "4 * 1 message, ends:", "1 * 1 message, ends:", "/branches takes a number from 1 to 4",
        "name a file: /save FILE", "typed.jsonl: 6 messages", "rollouts.jsonl is already there",
    ):  # fmt: skip
        assert part in said, part
    session = Session.load(file)
    assert [each.content for each in session.children(None)] == ["Hello", "/slash"]
    replies = session.children(session.children(None)[0].id)
    assert [(each.made.edits, each.made.seed) for each in replies if each.made is not None] == [
        ("", 0), ("optimistic@1:affine(3)", 1), ("optimistic@1:affine(3)", 7),
    ]  # fmt: skip
    assert session.current == replies[0].id
    assert "optimistic@1:affine(3)" in session.html()


PEOPLE = """\
format_version: 1
domain: weather
users:
  - name: ann
    about: Ann wonders about rain.
    turns: [Hello, "Will it rain?", "And then?"]
  - name: bob
    turns: [Hi, "Is it cold?", "Why?"]
"""


def test_drift_is_held_replayed_and_told(model: Path, plain: Path, tmp_path: Path) -> None:
    people, out = tmp_path / "people.yaml", tmp_path / "run"
    more = (f"  - name: cat-{number}\n    turns: [Meow {number}, Hiss {number}]\n" for number in range(4))
    people.write_text(PEOPLE + "".join(more))
    asked: tuple[Any, ...] = (
        "drift",
        model,
        plain,
        "--layers",
        "0,1",
        "--dtype",
        "float32",
        "--users",
        people,
        "--turns",
        2,
    )
    asked += ("--random-directions", 2, "--permutations", 2, "--max-new-tokens", 3, "--edits", "optimistic@1:+2")
    planned = parsed(*asked, "--dry-run", "--out", out)["work"]
    assert [(each["label"], each["rows"]) for each in planned] == [("unsteered replies", 12), ("steered replies", 12)]
    assert not out.exists()
    found = parsed(*asked, "--out", out)
    assert found["counts"] == {"conversations": 6, "turns": 2, "replies": 24, "empty": found["counts"]["empty"]}
    assert {"report.html", "summary.json", "drift-turns.jsonl"} <= {p.name for p in out.iterdir()}
    shown = " ".join(run(*asked, "--out", out).stdout.split())
    for part in ("optimistic@0: mean projection", "messages foretell it", "optimistic@1 under", "report:"):
        assert part in shown
    few = (*asked, "--conversations", 2, "--out", tmp_path / "few")
    shown = " ".join(run(*few).stdout.split())
    for part in ("only 2 conversations", "optimistic@1: 2 conversations are too few"):
        assert part in shown
    assert "question" not in shown


def test_drift_with_the_model_itself_as_the_user(model: Path, plain: Path, tmp_path: Path) -> None:
    people = tmp_path / "people.yaml"
    people.write_text(PEOPLE)
    asked: tuple[Any, ...] = (
        "drift",
        model,
        plain,
        "--layer",
        "1",
        "--dtype",
        "float32",
        "--users",
        people,
        "--turns",
        2,
    )
    asked += ("--max-new-tokens", 3, "--user-model", model, "--user-tokens", 4, "--out", tmp_path / "run")
    assert [each["label"] for each in parsed(*asked, "--dry-run")["work"]] == [
        "unsteered replies",
        "messages of the users",
    ]
    found = parsed(*asked)
    assert found["played_by"]["max_new_tokens"] == 4
    turns = [json.loads(line) for line in (tmp_path / "run" / "drift-turns.jsonl").read_text().splitlines()]
    assert [each["message"] for each in turns[:2]] == ["Hello", "Hi"]
    assert turns[2]["message"] != "Will it rain?"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--user-tokens", "5"), "--user-tokens: for a model that plays the users; name one with --user-model"),
        (("--user-model", "openai:"), "--user-model needs a model: openai:NAME"),
        (("--user-model", "here", "--user-url", "http://x/v1"), "--user-url: only for --user-model openai:NAME"),
        (("--turns", "1"), "drift needs at least 2 turns, got 1"),
        (("--turns", "99"), "0 scripted users"),
        (("--history", "washed"), "a history is steered or clean; got 'washed'"),
        (("--users", "/nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_drift_that_cannot_be_held(model: Path, plain: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(PersonaLensError, match=re.escape(message)):
        run("drift", model, plain, "--layer", "1", "--dtype", "float32", *arguments, "--out", "/nowhere/run")
