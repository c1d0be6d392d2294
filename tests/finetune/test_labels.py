"""Labels of utterances, and folds: every utterance is tested once, and no group is in two parts of a split."""

from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from transformers import Wav2Vec2FeatureExtractor

from w2v2.cli import parse_command_line
from w2v2.errors import UserError
from w2v2.finetune import labels
from w2v2.finetune.ctc_data import read_utterances
from w2v2.finetune.labels import group_splits, shared_groups


def write_manifest(folder, header, *rows):
    for i in range(len(rows)):
        soundfile.write(folder / f"{i}.wav", np.full(16_000 + 1_600 * i, i / 100), 16_000)
    (folder / "m.csv").write_text("\n".join([header, *rows]) + "\n")
    return [str(folder / "m.csv")]


def targets(tmp_path, header, rows, column="label", **rules):
    args = SimpleNamespace(data_root=None, output_dir=tmp_path, max_skipped_fraction=0.0)
    table, _ = read_utterances(write_manifest(tmp_path, header, *rows), args, [column])
    return labels.with_targets(table, "m.csv", column, **rules)


def test_any_column_may_be_the_label(tmp_path):
    rows = ["0.wav,ang,f1,7", "1.wav,sad,m2,8"]
    for column, expected in (("label", ["ang", "sad"]), ("speaker", ["f1", "m2"]), ("Session", ["7", "8"])):
        table, dropped = targets(tmp_path, "audio,emotion,spk_id,Session", rows, column)
        assert (table["target"], dropped) == (expected, 0)
    table, _ = targets(tmp_path, "audio,label,emotion", ["0.wav,x,ang", "1.wav,y,sad"], "emotion")
    assert table["target"] == ["ang", "sad"] and table["label"] == ["x", "y"]  # its own name comes first


def test_labels_are_merged_and_others_left_out(tmp_path):
    rows = [f"{i}.wav,{label}" for i, label in enumerate(["exc", "hap", "xxx", "ang", "fru"])]
    table, dropped = targets(tmp_path, "audio,label", rows, label_map=["exc=hap"], labels=["hap", "ang"])
    assert table["target"] == ["hap", "hap", "ang"] and dropped == 2
    assert labels.known_labels(table["target"], ["hap", "ang"]) == ["hap", "ang"]
    assert labels.known_labels(table["target"]) == ["ang", "hap"]
    assert labels.known_labels(table["target"], ["hap", "ang", "hap"]) == ["hap", "ang"]


@pytest.mark.parametrize("header, rows, rules, message", [
    ("audio,label", ["0.wav,a", "1.wav,"], {}, "m.csv: utterance 1.wav has an empty label"),
    ("audio,text", ["0.wav,a"], {}, "m.csv: has no column 'label', which --label_column asks for .it has text."),
    ("audio,label,channel", ["0.wav,a,0"], dict(column="channel"), "no column 'channel', .*it has label."),
    ("audio,label", ["0.wav,a"], dict(labels=["b"]), "--labels b; label holds a"),
    ("audio,label", ["0.wav,a"], dict(label_map=["a="]), "--label_map 'a='"),
])  # fmt: skip
def test_what_is_wrong_with_labels_is_told(tmp_path, header, rows, rules, message):
    with pytest.raises(UserError, match=message):
        targets(tmp_path, header, rows, **rules)


def test_labels_are_composed_and_ordered_by_their_numbers(tmp_path):
    rows = [f"{i}.wav,{label}" for i, label in enumerate(["cafe\u0301", "caf\u00e9", "tea"])]
    table, dropped = targets(tmp_path, "audio,label", rows, labels=["cafe\u0301"], label_map=["tea=cafe\u0301"])
    assert table["target"] == ["caf\u00e9"] * 3 and dropped == 0
    assert labels.known_labels(["10", "9", "-1", "0.5"]) == ["-1", "0.5", "9", "10"]
    assert labels.known_labels(["spk10", "spk9", "b2", "b"]) == ["b", "b2", "spk9", "spk10"]
    assert labels.known_labels(["a", "b"], folder=["b", "a"]) == ["b", "a"]  # a folder to go on from
    assert labels.known_labels(["a", "b"], folder=["b", "c"]) == ["a", "b"]


def test_yaml_labels_are_what_the_file_says(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "labels: [yes, no, 007, 1:30, 1e3, ~x, 'on']\nlabel_map: [off=no]\nlabel_column: y\n"
    )
    (args,) = parse_command_line([labels.LabelArguments], [str(tmp_path / "c.yaml")])
    assert args.labels == ["yes", "no", "007", "1:30", "1e3", "~x", "on"]
    assert (args.label_map, args.label_column) == (["off=no"], "y")
    rows = [f"{i}.wav,{label}" for i, label in enumerate(["yes", "007", "on"])]
    assert targets(tmp_path, "audio,label", rows, labels=args.labels)[0]["target"] == ["yes", "007", "on"]


def test_new_audio_needs_no_labels(tmp_path):
    table, _ = targets(tmp_path, "audio,text", ["0.wav,a"], needed=False)
    assert table["target"] == [""]
    table, dropped = targets(tmp_path, "audio,label", ["0.wav,a", "1.wav,", "2.wav,z"], labels=["a"], needed=False)
    assert table["target"] == ["a", ""] and dropped == 1
    labels.check_known(["a"], table["target"], "m.csv")


def test_single_unseen_and_absent_labels_are_refused():
    with pytest.raises(UserError, match="single class .a."):
        labels.known_labels(["a", "a"])
    with pytest.raises(UserError, match="--labels c"):
        labels.known_labels(["a", "b"], ["a", "b", "c"])
    with pytest.raises(UserError, match="test.csv: 2 utterances have the label 'z' and 1 more"):
        labels.check_known(["a", "b"], ["a", "z", "z", "y"], "test.csv")


def make_dataset(tmp_path, crop_seconds, **options):
    path = tmp_path / "ramp.wav"
    soundfile.write(path, np.arange(32_000) / 32_768, 16_000)
    rows = [{"id": f"u{i}", "audio": str(path), "start": 0.5, "num_samples": 20_000 - 18_000 * (i == 3), "target": "b"}
            for i in range(4)]  # fmt: skip
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False)
    return labels.LabelledDataset(Dataset.from_list(rows), ["a", "b"], extractor, min_samples=400,
                                  skip_log=tmp_path / "skipped.jsonl", crop_seconds=crop_seconds, **options)  # fmt: skip


def test_a_crop_is_a_function_of_seed_epoch_and_utterance(tmp_path):
    data = make_dataset(tmp_path, 0.25, substitute=True)
    assert data.lengths == [4_000, 4_000, 4_000, 2_000]

    def starts(data):
        values = np.round(np.stack([data[row]["input_values"] for row in range(3)]) * 32_768).astype(int)
        assert values.shape == (3, 4_000) and (np.diff(values) == 1).all()
        assert 8_000 <= values.min() and values.max() < 28_000
        return values[:, 0].tolist()

    first = starts(data)
    assert starts(data) == first and len(set(first)) == 3
    data.epoch = 1
    assert starts(data) != first
    assert starts(make_dataset(tmp_path, 0.25, substitute=True, seed=1)) != first
    assert len(make_dataset(tmp_path, 0.0, substitute=True)[0]["input_values"]) == 20_000


def test_unreadable_audio_has_no_label_to_score(tmp_path):
    data = make_dataset(tmp_path, 0.0, substitute=False)
    items = [data[0], data[3]]
    (tmp_path / "ramp.wav").write_bytes(b"no audio")
    batch = labels.collate_labelled([*items, data[1]])
    assert batch["labels"].tolist() == [1, 1, -100]
    assert batch["input_values"].shape == (3, 20_000)
    assert batch["attention_mask"].sum(1).tolist() == [20_000, 2_000, 400]
    assert torch.equal(labels.collate_labelled(items)["labels"], torch.tensor([1, 1]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_folds", [None, 3, 4])
def test_groups_are_disjoint_and_all_are_tested_once(seed, num_folds):
    random = np.random.default_rng(seed)
    groups = [f"s{i}" for i in random.integers(0, random.integers(4, 15), 120)]
    splits = group_splits(groups, "speaker", num_folds)
    assert len(splits) == (num_folds or len(set(groups)))
    assert sorted(row for split in splits for row in split.test) == list(range(len(groups)))
    for split in splits:
        parts = [{groups[row] for row in rows} for rows in (split.train, split.validation, split.test)]
        assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        assert sorted(split.train + split.validation + split.test) == list(range(len(groups)))
    assert shared_groups(splits, groups) == []


def test_folds_are_even_and_do_not_follow_the_order_of_rows():
    groups = [f"s{i}" for i in range(12) for _ in range(10)]
    assert {len(split.test) for split in group_splits(groups, "speaker", 4)} == {30}
    orders = (groups, list(np.random.default_rng(0).permutation(groups)))
    tested = [{frozenset(rows[i] for i in s.test) for s in group_splits(rows, "speaker", 4)} for rows in orders]
    assert tested[0] == tested[1]


def test_a_speaker_in_two_sessions_is_found():
    sessions, speakers = list("112233"), ["a", "b", "c", "d", "e", "a"]
    assert shared_groups(group_splits(sessions, "session"), speakers) == ["a"]
    assert shared_groups(group_splits(sessions, "session"), ["a", "b", "c", "d", "", ""]) == []


def test_a_name_is_one_group_whether_composed_or_not(tmp_path):
    names = ["Jos\u00e9", "Ann", "Bo", "Jose\u0301"]
    table, _ = targets(tmp_path, "audio,label,speaker", [f"{i}.wav,a,{name}" for i, name in enumerate(names)])
    groups = labels.values_of(table, "speaker", "folds", "m.csv")
    assert [split.test for split in group_splits(groups, "speaker")] == [[1], [2], [0, 3]]


@pytest.mark.parametrize("groups, num_folds, message", [
    (["a", "", "b", "c"], None, "utterance 2 has no speaker"),
    (["a", "b", "a", "b"], None, "2 folds; 3 are needed"),
    (["a", "b", "c", "d"], 5, "--num_folds 5"),
])  # fmt: skip
def test_groups_that_cannot_be_folded_are_refused(groups, num_folds, message):
    with pytest.raises(UserError, match=message):
        group_splits(groups, "speaker", num_folds)
