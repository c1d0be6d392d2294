"""--dataset_name in the scripts: a data set gives the run that manifests of the same audio give."""

import json
import shutil

import datasets
import pandas as pd
import pyarrow as pa
import pytest
import torch
import yaml
from conftest import NOISY, ONE_UPDATE, assert_same_run, refusal, run_here, tiny_config, write_recipe, write_tones
from ranks import TWO_PROCESSES, finish, start_run
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForPreTraining

import finetune_classification
import finetune_ctc
import pretrain
import probe

STOP = ("--max_hours", ONE_UPDATE)
TEXTS = ["one two", "two", "three one", "two three", "one", "three"]
SHORT = ["--max_steps=2", "--eval_steps=2", "--save_steps=2", "--use_cpu", "--per_device_train_batch_size=2", "--report_to=none",
         "--gradient_accumulation_steps=1", "--mask_feature_length=8", "--dataloader_num_workers=0"]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def as_dataset(paths, **columns):
    """Encoded files and further columns, as `datasets` has them."""
    audio = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    table = pa.table({"audio": pa.array(audio, datasets.Audio.pa_type)} | columns)
    return datasets.Dataset(table).cast_column("audio", datasets.Audio(decode=False))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Flags of a run by manifests, and by the same audio in a saved data set and in Parquet files; the former's folder."""
    folder = tmp_path_factory.mktemp("pretrain")
    # An update has two micro-batches, on one process as on two: then noise is the same too.
    own = dict(batch_hours=0.002, micro_batch_seconds=6.8, max_steps=6, eval_steps=3, dataloader_num_workers=0)
    config = write_recipe(folder, NOISY, **own, report_to=["none"], use_cpu=True)
    flags = yaml.safe_load(config.read_text())
    paths = {"train": flags.pop("train_data")[0], "validation": flags.pop("validation_data")[0]}
    audio = {split: map(type(folder), pd.read_csv(path)["audio"]) for split, path in paths.items()}
    splits = datasets.DatasetDict({split: as_dataset(list(found)) for split, found in audio.items()})
    splits.save_to_disk(folder / "saved")
    for split, found in splits.items():
        found.to_parquet(folder / f"parquet/{split}-00000-of-00001.parquet")
    for form in ("saved", "parquet"):
        theirs = dict(dataset_name=str(folder / form), eval_split_name="validation")
        (folder / f"{form}.yaml").write_text(yaml.safe_dump(flags | theirs))
    assert run_here(pretrain.main, config, "--output_dir", folder / "by_manifest") == 0
    return folder


def test_pretraining_is_that_of_manifests_and_resumes_from_another_place(recipe):
    assert run_here(pretrain.main, recipe / "saved.yaml", "--output_dir", recipe / "by_set") == 0
    assert_same_run(recipe / "by_set", recipe / "by_manifest")
    card = (recipe / "by_set/README.md").read_text()
    assert "`saved [train]`, 20 utterances" in card and str(recipe) not in card
    # The same set in another folder, and in Parquet files: its ids, and so the run, go on.
    shutil.move(recipe / "saved", recipe / "moved")
    resume = ["--output_dir", recipe / "resumed", "--resume_from_checkpoint", "auto"]
    for name, *more in [("moved", *STOP), ("parquet", *STOP), ("moved", *STOP), ("moved",)]:
        flags = [*resume, "--dataset_name", recipe / name, *more]
        assert run_here(pretrain.main, recipe / "saved.yaml", *flags) == (75 if more else 0)
    assert_same_run(recipe / "resumed", recipe / "by_manifest")


def test_two_processes_prepare_the_set_once(recipe):
    where = dict(HF_DATASETS_CACHE=recipe / "their_cache")
    finish(start_run(recipe / "parquet.yaml", recipe / "two", launcher=TWO_PROCESSES, **where), recipe / "two")
    assert_same_run(recipe / "two", recipe / "by_manifest", exactly=False)
    assert len(list((recipe / "two/cache").glob("utterances-*.arrow"))) == 2  # training, validation


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Six utterances with words, moods and speakers, as a manifest and as a data set; a pretrained folder."""
    folder = tmp_path_factory.mktemp("spoken")
    paths = write_tones(folder / "audio", [1.0, 0.9, 1.2, 1.1, 0.8, 1.3])
    columns = dict(words=TEXTS, mood=[0, 1] * 3, speaker=list("aabbcc"))
    found = as_dataset(paths, **columns).cast_column("mood", datasets.ClassLabel(names=["calm", "merry"]))
    datasets.DatasetDict(train=found, dev=found.select([1, 2]), test=found.select([0, 3])).save_to_disk(folder / "set")
    rows = pd.DataFrame({"id": [path.name for path in paths], "audio": paths, "text": TEXTS})
    for name, picked in dict(train=range(6), dev=[1, 2], test=[0, 3]).items():
        rows.iloc[list(picked)].to_csv(folder / f"{name}.csv", index=False)
    torch.manual_seed(0)
    Wav2Vec2ForPreTraining(tiny_config()).save_pretrained(folder / "pretrained")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder / "pretrained")
    return folder


def splits_of(folder, output):
    return [f"--dataset_name={folder / 'set'}", "--eval_split_name=dev", "--test_split_names=test",
            f"--output_dir={folder / output}"]  # fmt: skip


def test_ctc_learns_and_scores_as_from_manifests(spoken):
    start = [f"--model_name_or_path={spoken / 'pretrained'}", *SHORT]
    manifests = [f"--{flag}={spoken / name}.csv" for flag, name in
                 dict(train_data="train", validation_data="dev", test_data="test").items()]  # fmt: skip
    finetune_ctc.main([*manifests, f"--output_dir={spoken / 'by_manifest'}", *start])
    finetune_ctc.main([*splits_of(spoken, "by_set"), "--text_column_name=words", *start])
    ours, theirs = (json.loads((spoken / name / "results.json").read_text()) for name in ("by_set", "by_manifest"))
    for name in ("validation", "test"):
        assert ours[name] == theirs[name]


def test_classes_keep_their_names(spoken):
    flags = [*splits_of(spoken, "classes"), "--label_column_name=mood", *SHORT]
    finetune_classification.main([*flags, f"--model_name_or_path={spoken / 'pretrained'}"])
    config = json.loads((spoken / "classes/config.json").read_text())
    assert config["id2label"] == {"0": "calm", "1": "merry"}


def test_a_probe_reads_a_data_set(spoken):
    flags = [*splits_of(spoken, "probe"), "--target=mood", "--random_weights=false", "--use_cpu"]
    probe.main([*flags, f"--checkpoints={spoken / 'pretrained'}"])
    assert json.loads((spoken / "probe/probe.json").read_text())["run"]["tested"] == 2


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--train_data=a.csv", "--dataset_name=b"], ["--train_data and --dataset_name exclude one another"]),
        (["--validation_data=a.csv", "--dataset_name=b", "--eval_split_name=c"], ["--validation_data and --eval_split_"]),
        (["--train_data=a.csv", "--eval_split_name=c"], ["--eval_split_name needs --dataset_name"]),
        (["--train_data=a.csv", "--dataset_config_name=c"], ["--dataset_config_name needs --dataset_name"]),
        (["--dataset_nmae=b"], ["--dataset_nmae (did you mean --dataset_name?)"]),
        (["--dataset_name={folder}/sett"], ["did you mean", "/set?", "no folder has this name"]),
        (["--dataset_name={folder}/train.csv"], ["train.csv is a file", "--train_data"]),
        (["--dataset_name={folder}/set", "--dataset_split_names", "trian"], ["no split 'trian'", "did you mean train?"]),
        (["--dataset_name={folder}/set", "--audio_column_name=sound"], ["no column 'sound'", "audio, words, mood"]),
        (["--dataset_name={folder}/set", "--audio_column_name=mood"], ["the column mood holds", "datasets.Audio"]),
        (["--dataset_name={folder}/set", "--dataset_config_name=c"], ["save_to_disk", "--dataset_config_name c out"]),
    ],
)  # fmt: skip
def test_slips_end_with_status_2_and_one_line(spoken, tmp_path, capsys, flags, named):
    flags = [flag.format(folder=spoken) for flag in flags]
    run = [
        f"--output_dir={tmp_path / 'run'}",
        f"--config_name={spoken / 'pretrained'}",
        "--use_cpu",
        "--report_to=none",
    ]
    refusal(capsys, pretrain.main, *flags, *run, named=named)


def test_a_column_of_texts_needs_a_data_set(spoken, tmp_path, capsys):
    flags = [f"--train_data={spoken}/train.csv", f"--validation_data={spoken}/dev.csv", "--text_column_name=words"]
    more = [f"--output_dir={tmp_path / 'run'}", f"--model_name_or_path={spoken / 'pretrained'}", *SHORT]
    refusal(capsys, finetune_ctc.main, *flags, *more, named=["--text_column_name needs --dataset_name"])
