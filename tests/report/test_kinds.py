"""Pages of fine-tunings, probes and comparisons: alignments against brute force, audio against its file."""

import base64
import io
import json
import re
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pytest
import soundfile
from conftest import write_csv, write_tones
from report_runs import (
    HOSTILE,
    read_page,
    write_classification,
    write_lines,
    write_pretraining,
    write_probe,
    write_recognition,
    write_results,
)

from w2v2.evaluate.scores import count_edits
from w2v2.report.transcripts import EDITS, align, count_confusions


def edit_distance(ours, theirs):
    row = list(range(len(theirs) + 1))
    for n, unit in enumerate(ours, start=1):
        before, row = row, [n]
        for m, other in enumerate(theirs, start=1):
            row.append(min(before[m] + 1, row[m - 1] + 1, before[m - 1] + (unit != other)))
    return row[-1]


@pytest.mark.parametrize("by_letters", [False, True])
def test_alignments_are_shortest_and_lose_nothing(by_letters):
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(list("abcd"), random.integers(1, 9))) for _ in range(60)]
    references, hypotheses = texts[:30], [*texts[30:59], ""]
    aligned = align(references, hypotheses, by_letters)
    for ours, theirs, pairs in zip(references, hypotheses, aligned, strict=True):
        units, others = (list(text) if by_letters else text.split() for text in (ours, theirs))
        assert [pair.reference for pair in pairs if pair.reference] == units
        assert [pair.hypothesis for pair in pairs if pair.hypothesis] == others
        assert sum(pair.kind != "equal" for pair in pairs) == edit_distance(units, others)
        assert all((pair.reference == pair.hypothesis) == (pair.kind == "equal") for pair in pairs)
    if not by_letters:
        found, counts = count_confusions(aligned), count_edits(references, hypotheses)
        assert [one.total() for one in found.values()] == [counts[kind] for kind in EDITS]


def test_a_recogniser_tells_scores_errors_and_warnings(tmp_path):
    page = read_page(write_recognition(tmp_path / "run"))
    assert "WER is 42.9 % on validation, with the weights of update 10 of 20." in page.text  # 3 errors in 7 words
    titles = page.of("b")
    for title in ("Error rates", "validation", "Substituted words", "Deleted letters", "WER 100%", "WER 33%"):
        assert title in titles, title
    assert "script" not in {name for name, _ in page.elements} and "WER 0%" not in titles
    assert f"cat → {HOSTILE}"[:10] in page.text and HOSTILE in page.text


def test_a_script_without_spaces_is_aligned_by_letters(tmp_path):
    page = read_page(write_recognition(tmp_path / "run", texts={"a": ("天地人山", "天土人山"), "b": ("水火", "水火")}))
    assert "Substituted letters" in page.of("b") and "Substituted words" not in page.of("b")
    assert page.source.count('<span class="equal">') == 3


def test_tokens_are_no_words(tmp_path):
    lines = [{"set": "test", "id": "a", "reference": "ae t", "hypothesis": "ae d", "per": 0.5}]
    titles = read_page(write_results(tmp_path / "run", {"test": {"per": 0.5}}, lines, {})).of("b")
    assert "Substituted tokens" in titles and "PER 50%" in titles and "Substituted letters" not in titles


def test_a_run_without_results_says_so(tmp_path):
    folder = write_recognition(tmp_path / "run")
    (folder / "results.json").unlink()
    (folder / "predictions.jsonl").unlink()
    (folder / "vocab.json").write_text("{}")
    text = read_page(folder).text
    assert "There are no scores yet" in text and "10 updates are logged" in text and "no predictions" in text


@pytest.fixture
def heard(tmp_path):
    """A run with a manifest: two short files, a long one whose rows start late, and one that is gone."""
    paths = write_tones(tmp_path / "audio", [2.0, 12.0])
    manifest = write_csv(tmp_path / "dev.csv", [*paths, tmp_path / "gone.wav"], [2.0, 12.0, 1.0])
    texts = {str(name): ("one two", "one") for name in (*paths, tmp_path / "gone.wav", "of another set")}
    return write_recognition(tmp_path / "run", texts=texts, validation_data=[str(manifest)]), paths


def test_embedded_audio_is_the_files(heard):
    folder, paths = heard
    page = read_page(folder, num_audio=10)
    sounds = {a["aria-label"]: a["src"] for name, a in page.elements if name == "audio"}
    assert sounds.keys() == {str(path) for path in paths}
    for path in paths:
        samples, rate = soundfile.read(io.BytesIO(base64.b64decode(sounds[str(path)].partition("base64,")[2])))
        source, _ = soundfile.read(path)
        assert rate == 16_000 and len(samples) == min(len(source), 160_000)
        assert np.abs(samples - source[: len(samples)]).max() < 1e-4
    for said in ("No audio of 1 utterances", "do not have them", "the first 10 s can be heard"):
        assert said in page.text, said
    assert not any(name == "audio" for name, _ in read_page(folder).elements)


def test_audio_of_a_data_set_is_embedded(tmp_path):
    """Which holds its bytes, and loses the files."""
    paths = write_tones(tmp_path / "audio", [1.0, 2.0])
    sources = {path.name: soundfile.read(path)[0] for path in paths}
    audio = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    table = datasets.Dataset(pa.table({"audio": pa.array(audio, datasets.Audio.pa_type)}))
    splits = datasets.DatasetDict(dev=table.cast_column("audio", datasets.Audio(decode=False)))
    splits.save_to_disk(tmp_path / "set")
    shutil.rmtree(tmp_path / "audio")
    flags = dict(dataset_name=str(tmp_path / "set"), eval_split_name="dev")
    texts = dict.fromkeys(sources, ("one two", "one"))
    page = read_page(write_recognition(tmp_path / "run", texts=texts, **flags), num_audio=2)
    sounds = {a["aria-label"]: a["src"].partition("base64,")[2] for name, a in page.elements if name == "audio"}
    for name, source in sources.items():
        assert np.abs(soundfile.read(io.BytesIO(base64.b64decode(sounds[name])))[0] - source).max() < 1e-4


def test_audio_that_would_make_the_page_large_is_left_out(heard, monkeypatch):
    monkeypatch.setattr("w2v2.report.playback.MOST_BYTES", 100_000)
    page = read_page(heard[0], num_audio=10)
    assert "the page would pass 2 MB" in page.text and len(page.source) < 200_000


def test_a_manifest_that_is_gone_is_said(tmp_path):
    folder = write_recognition(tmp_path / "run", validation_data=[str(tmp_path / "gone.csv")])
    assert "make the report where the run was started" in read_page(folder, num_audio=1).text
    assert "do not have them" in read_page(write_recognition(tmp_path / "other"), num_audio=1).text


def test_a_classifier_shows_its_confusions(tmp_path):
    page = read_page(write_classification(tmp_path / "run"))
    assert "UAR is 58.3 % on test" in page.text and "A constant answer earns 33.3 %" in page.text  # (1/2 + 2/3) / 2
    assert "joy → joy: 2 of 3 (67%)" in page.text and "anger → joy: 1 of 2 (50%)" in page.text
    assert f"joy taken for {HOSTILE}, 90.0 %" in page.text
    assert page.text.index("taken for " + HOSTILE) < page.text.index("anger taken for joy")


def test_many_classes_are_a_table(tmp_path):
    lines = [{"set": "test", "id": str(n), "reference": f"s{n}", "prediction": f"s{n // 2}"} for n in range(50)]
    results = {
        "test": {"accuracy": 0.02, "uar": 0.02, "utterances": 50},
        "run": {"labels": [f"s{n}" for n in range(50)]},
    }
    page = read_page(write_results(tmp_path / "run", results, lines, {}))
    assert "Most confused, test" in page.text and "confusion" not in page.source.split("</style>")[1]


def test_folds_are_pooled_and_listed(tmp_path):
    scores = {"uar": 0.5, "accuracy": 0.6, "macro_f1": 0.4}
    results = {"pooled": scores | {"utterances": 9}, "mean": scores, "std": scores}
    results |= {"folds": [{"fold": "fold-1", **scores}], "run": {"labels": ["a", "b"]}}
    text = read_page(write_results(tmp_path / "run", results, [], {})).text
    assert "UAR is 50.0 % on pooled" in text and "fold-1" in text and "mean of the folds" in text


def test_a_probe_shows_its_layers(tmp_path):
    page = read_page(write_probe(tmp_path / "run"))
    assert "late does best on emotion: UAR 70.0 % at layer 1, random weights 30.0 %, chance 25.0 %." in page.text
    assert "70.0 % *" in page.text and "UAR of the best layer" in page.of("b") and HOSTILE in page.text


def test_runs_of_a_kind_are_compared(tmp_path):
    first, second = (write_pretraining(tmp_path / n / "run", learning_rate=float(n) / 100) for n in "12")
    scores = write_recognition(tmp_path / "ctc")
    page = read_page(first, second, scores)
    names = ["1/run", "2/run"]
    charts = [
        text for text in page.of("desc") if text.startswith("Lines") and all(f"{name}: " in text for name in names)
    ]
    assert len(charts) == 6
    (differences,) = re.findall(r"<caption>Flags that differ</caption>.*?</table>", page.source, re.S)
    assert re.findall(r">(learning_rate|0.01|0.02|max_steps|output_dir)<", differences) == [
        "learning_rate",
        "0.01",
        "0.02",
    ]
    (finals,) = re.findall(r"<caption>At the end of each run, in validation</caption>.*?</table>", page.source, re.S)
    assert finals.count("40.0") == 2 and page.text.count("The whole report of") == 3


def test_held_out_figures_stand_beside_no_training_ones(tmp_path):
    runs = [write_pretraining(tmp_path / name) for name in ("one", "two")]
    for folder, is_validated in zip(runs, (True, False), strict=True):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines = [line | ({"eval_accuracy": 0.9} if "eval_loss" in line else {}) for line in lines]
        write_lines(folder / "metrics.jsonl", [line for line in lines if is_validated or "loss" in line])
    page = read_page(*runs)
    (finals,) = re.findall(r"<caption>At the end of each run, in training</caption>.*?</table>", page.source, re.S)
    assert finals.count("40.0") == 2 and "90.0" not in finals and "90.0" in page.source


def test_many_runs_leave_their_own_charts_out(tmp_path, monkeypatch):
    runs = [write_pretraining(tmp_path / name) for name in ("one", "two")]
    whole = read_page(*runs)
    monkeypatch.setattr("w2v2.report.page.MOST_BYTES", len(whole.source.encode()) - 1)
    page = read_page(*runs)
    assert page.text.count("make its own report") == 2 and "Flags that differ" not in page.text
    assert len(page.of("desc")) == 6 < len(whole.of("desc"))


def test_the_same_flags_are_said_to_be_the_same(tmp_path):
    first, second = write_pretraining(tmp_path / "one"), write_pretraining(tmp_path / "two")
    for folder in (first, second):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][:5]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Their flags are the same" in read_page(first, second).text
