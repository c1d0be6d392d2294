"""The page of a run: what it says, what it says of what is missing, and that nothing written by people is markup."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from conftest import error_line, run_here
from report_runs import HOSTILE, Page, read_page, write_lines, write_pretraining

import report
from w2v2.arguments import PretrainArguments
from w2v2.errors import UserError
from w2v2.plan.expectations import find_references
from w2v2.report.page import find_defaults, report_at_end, report_run, write_report
from w2v2.report.pretraining import list_figures
from w2v2.report.run_files import read_run


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory):
    return write_pretraining(tmp_path_factory.mktemp("runs") / "small")


def test_a_pretraining_says_what_its_files_hold(pretraining):
    page = read_page(pretraining, defaults={"learning_rate": 5e-4, "max_steps": 60})
    assert "All 60 updates are done. In validation" in page.text and "in 40.0 % of" in page.text
    for said in (
        "raise --batch_hours",
        "no audio in it",
        "torch 2.10",
        "2.5 h from start to end",
        "how sure not at all",
    ):
        assert said in page.text, said
    planned = page.text.split("What was planned")[1].split("Warnings and events")[0]
    assert "data 6.00 h in 100 utterances (left out: 4 too_short, 0.01 h)" in planned and "raise" not in planned
    titles = page.of("b")
    for title in ("Contrastive loss", "Accuracy", "Coverage", "Codebook 2", "Masked", "Throughput", "Sources"):
        assert title in titles, title
    changed, at_defaults = page.text.split("flags that are not the defaults")[1].split("flags at their defaults")
    assert "learning_rate 0.001 0.0005" in changed and "max_steps 60" in at_defaults


def test_a_page_runs_nothing_and_asks_nothing_of_the_network(pretraining):
    page = read_page(pretraining)
    attributes = [pair for _, found in page.elements for pair in found.items()]
    assert "script" not in {name for name, _ in page.elements} and HOSTILE in page.text
    assert not [key for key, _ in attributes if key.startswith("on")]
    links = [value for key, value in attributes if key in ("href", "src")]
    assert all(value.startswith(("#", "data:")) for value in links) and "url(" not in page.source
    pictures = [found for name, found in page.elements if name == "svg" and "aria-hidden" not in found]
    assert pictures and all(found["role"] == "img" and found["aria-label"] for found in pictures)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("plan.json", "There is no plan.json of this version"),
        ("codebook_use.jsonl", "no codebook_use.jsonl"),
        ("events.jsonl", "command and versions are not known"),
        ("skipped_audio.jsonl", "No file was skipped"),
        ("pretrain_config.yaml", "no file of flags"),
        ("metrics.jsonl", "No update was logged yet"),
    ],
)
def test_what_is_missing_is_said(tmp_path, missing, said):
    folder = write_pretraining(tmp_path / "run")
    (folder / missing).unlink()
    assert said in read_page(folder).text


def test_a_run_without_validation_says_so(tmp_path):
    folder = write_pretraining(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    write_lines(folder / "metrics.jsonl", [line for line in lines if "eval_loss" not in line])
    text = read_page(folder).text
    assert "No validation was run" in text and "In training the model" in text


def test_device_hours_are_known_whole_or_not(tmp_path):
    folder = write_pretraining(tmp_path / "run")
    figures = {label: (value, remark) for label, value, remark in list_figures(read_run(folder))}
    assert figures["Device-hours"] == ("0.24", "2.5 h from start to end")  # 6 h heard at 50 times real time, twice
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[:5]:
        line.pop("num_processes")
    write_lines(folder / "metrics.jsonl", lines)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    write_lines(folder / "events.jsonl", [events[0], events[0] | {"event": "resume"}, events[1]])
    figures = {label: (value, remark) for label, value, remark in list_figures(read_run(folder))}
    assert figures["Device-hours"] == ("–", "2.5 h from start to end, with its pauses")


def test_torn_and_damaged_files_are_tolerated(tmp_path):
    folder = write_pretraining(tmp_path / "run")
    for name in ("metrics.jsonl", "events.jsonl", "codebook_use.jsonl"):
        with open(folder / name, "ab") as file:
            file.write(b'{"step": 61, "lo')
    text = read_page(folder).text
    assert "All 60 updates" in text and "cannot be read" not in text
    with open(folder / "events.jsonl", "ab") as file:
        file.write(b'\n{"event": "stop", "step": 60, "message": "\xf0\x9f\x98\x80"}\n')
    (folder / "plan.json").write_text("[1]")
    text = read_page(folder).text
    assert "events.jsonl: 1 lines cannot be read, the first is line 3" in text and "plan.json cannot be read" in text


@pytest.mark.parametrize(
    ("accuracy", "events", "said"),
    [
        (0.1, [], "nothing is learned"),
        (0.4, ["start", "collapse", "stop"], "57 of 60 updates are done. The run collapsed: by collapse"),
        (0.4, ["start", "collapse", "stop", "resume", "finish"], "All 60 updates are done. In validation"),
        (0.4, ["start", "collapse", "finish"], "updates are done; a collapse was seen at update 30. In validation"),
        (0.4, ["start", "stop"], "57 of 60 updates are done; the run stopped: by stop."),
        (0.4, ["start", "stop", "resume"], "All 60 updates are done. In validation"),
        (None, [], "no finite figures"),
    ],
)
def test_the_verdict_follows_the_figures(tmp_path, accuracy, events, said):
    folder = write_pretraining(tmp_path / "run", last_accuracy=accuracy or 0.4)
    steps = {"start": 0, "stop": 57, "resume": 50, "collapse": 30}
    lines = [{"step": steps.get(event, 60), "event": event, "message": f"by {event}"} for event in events]
    write_lines(folder / "events.jsonl", lines)
    if accuracy is None:
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"step": 60, "audio_hours": 6, "eval_loss": null, "eval_accuracy": null}\n')
    assert said in read_page(folder).text


def test_a_long_run_is_a_small_page(tmp_path):
    folder = write_pretraining(tmp_path / "run", updates=8_000)
    entries = [[n % 320 for n in range(320)]] * 2
    write_lines(
        folder / "codebook_use.jsonl", ({"step": n, "audio_hours": n / 9, "counts": entries} for n in range(400))
    )
    assert len(read_page(folder).source.encode()) < 1e6


@pytest.mark.parametrize(
    ("name", "said"), [("smal", "did you mean"), ("small/runs", "no such folder"), ("empty", "not a run's folder")]
)
def test_a_folder_that_is_no_run_is_refused(pretraining, name, said):
    (pretraining.parent / "empty").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=said):
        write_report([pretraining.parent / name], pretraining / "page.html", {})


def test_the_script_writes_into_the_run(pretraining, capsys):
    assert run_here(report.main) == 2 and "RUN" in error_line(capsys.readouterr().err)
    assert run_here(report.main, pretraining, "--output", pretraining) == 2  # a folder
    assert "name another file with --output" in error_line(capsys.readouterr().err)
    report.main([str(pretraining)])
    assert "small" in Page(pretraining / "report.html").of("h1") and "report.html" in capsys.readouterr().out


@dataclass
class Flags:
    output_dir: str


def test_a_page_that_fails_fails_no_run(tmp_path, capsys):
    report_run(Flags(str(tmp_path)))
    line = capsys.readouterr().out
    assert line.startswith("warning       report.html was not written: ") and line.count("\n") == 1


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_run_that_ends_in_an_error_has_a_page_if_it_began(tmp_path, has_begun):
    folder = write_pretraining(tmp_path / "run")
    with pytest.raises(KeyError), report_at_end(Flags(str(folder)), SimpleNamespace(has_begun=has_begun)):
        raise KeyError("the run's own error")
    assert (folder / "report.html").exists() == has_begun


def test_a_run_stands_before_what_is_usual(tmp_path):
    """A run of BASE's shape whose accuracy is the middle of a public run's, and one that is far above it."""
    model = {"hidden_size": 768, "num_hidden_layers": 12, "num_codevector_groups": 2, "num_codevectors_per_group": 320}
    model |= {"num_negatives": 100}
    flags = SimpleNamespace(batch_hours=1.3333, mask_time_prob=0.65, mask_time_length=10, model_name_or_path=None)
    reference = find_references(SimpleNamespace(**model), flags)[0]
    middle = reference.points["eval_accuracy"][:, [0, 2]].tolist()
    for name, factor in {"inside": 1.0, "above": 1.5}.items():
        folder = write_pretraining(tmp_path / name, batch_hours=1.3333)
        (folder / "config.json").unlink()
        (folder / "checkpoint-20").mkdir()
        (folder / "checkpoint-20" / "config.json").write_text(json.dumps({"model_type": "wav2vec2"}))  # all defaults
        lines = [
            {"step": n, "audio_hours": hours, "loss": 3.0, "eval_loss": 3.0, "eval_accuracy": factor * value}
            for n, (hours, value) in enumerate(middle, start=1)
        ]
        write_lines(folder / "metrics.jsonl", lines)
        page = read_page(folder, defaults=find_defaults(PretrainArguments))
        assert f"is {name} the band of {reference.name}" in page.text
        assert page.source.count('class="band"') == 2  # in the accuracy's chart and its legend
