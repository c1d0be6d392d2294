import json
import math

import pytest
import yaml

from w2v2.cli import parse_command_line
from w2v2.errors import UserError
from w2v2.finetune.arguments import FineTuningArguments, prepare_output_dir, write_config
from w2v2.finetune.evaluation import write_results
from w2v2.finetune.text import CTCArguments, build_vocabulary, follow_text

CHECKPOINT = ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "config.json")


def arguments(tmp_path, **flags):
    flags = dict(model_name_or_path=str(tmp_path / "model"), use_cpu=True) | flags
    return FineTuningArguments(output_dir=str(tmp_path / "run"), train_data=["t"], validation_data=["v"], **flags)


def make_checkpoint(folder, leave_out=None):
    folder.mkdir(parents=True)
    for name in CHECKPOINT:
        if name != leave_out:
            (folder / name).touch()
    return folder


def test_defaults_are_the_recipe_for_100_hours(tmp_path):
    args = arguments(tmp_path)
    assert (args.learning_rate, args.max_steps, args.lr_scheduler_type) == (3e-5, 80_000, "tri_stage")
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.weight_decay) == (0.9, 0.98, 1e-8, 0.0)
    assert (args.warmup_steps, args.hold_fraction, args.final_lr_scale) == (0.1, 0.4, 0.05)
    assert {name: value for name, value in args.model_changes().items() if value and name != "apply_spec_augment"} == {
        "mask_time_prob": 0.65, "mask_time_length": 10, "mask_feature_prob": 0.5, "mask_feature_length": 64,
        "layerdrop": 0.1, "activation_dropout": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize("flags, message", [
    (dict(train_data=[]), "--train_data is required"),
    (dict(config_name="c"), "one of --model_name_or_path .* --config_name"),
    (dict(do_train=False, config_name="c"), "--do_train false needs a fine-tuned model"),
    (dict(do_train=False, push_to_hub=True), "--do_train false with --push_to_hub"),
    (dict(min_seconds=5.0, max_seconds=2.0), "--max_seconds 2.0"),
    (dict(eval_steps=3, save_steps=4), "saving steps"),
    (dict(batch_seconds=100.0), "--batch_seconds needs --micro_batch_seconds"),
    (dict(micro_batch_seconds=0.0), "--micro_batch_seconds is 0"),
    (dict(max_steps=0), "--max_steps is 0"),
    (dict(accelerator_config="absent.json"), "absent.json"),
])  # fmt: skip
def test_flags_that_do_not_fit_are_named(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        FineTuningArguments(**(dict(output_dir=str(tmp_path), train_data=["t"], validation_data=["v"],
                                    model_name_or_path="m", use_cpu=True) | flags))  # fmt: skip


@pytest.mark.parametrize("flags, seconds", [
    (dict(), None),
    (dict(micro_batch_seconds=100.0), 1_600.0),
    (dict(micro_batch_seconds=100.0, gradient_accumulation_steps=4), 400.0),
    (dict(micro_batch_seconds=100.0, batch_seconds=250.0), 250.0),
])  # fmt: skip
def test_an_effective_batch_in_seconds_is_given_or_derived(tmp_path, flags, seconds):
    args = arguments(tmp_path, **flags)
    assert args.batch_seconds == seconds
    assert args.gradient_accumulation_steps == (16 if seconds is None else 1)  # what `Trainer` accumulates itself


@pytest.mark.parametrize("flags, message", [
    (dict(train_hours=-1.0), "--train_hours is -1"),
    (dict(beam_size=0), "--beam_size"),
    (dict(tune_lm=True), "--tune_lm needs .* --lm"),
    (dict(target_unit="tokens", word_score=1.0), "--word_score is for words"),
    (dict(target_unit="tokens", fold_accents=True), "--fold_accents is for words"),
    (dict(drop_tokens=["um"]), "--drop_tokens is for tokens"),
    (dict(lexicon="words.txt"), "--lexicon needs .* --lm"),
])  # fmt: skip
def test_flags_of_recognition_that_do_not_fit_are_named(flags, message):
    with pytest.raises(UserError, match=message):
        CTCArguments(**flags)


@pytest.mark.parametrize("flags", [
    dict(prediction_loss_only=True), dict(label_names=["x"]), dict(bf16_full_eval=True), dict(batch_eval_metrics=True),
    dict(include_for_metrics=["inputs"]), dict(dataloader_in_order=False), dict(dataloader_persistent_workers=True),
    dict(auto_find_batch_size=True), dict(label_smoothing_factor=0.1),
])  # fmt: skip
def test_flags_that_an_evaluation_cannot_bear_are_refused(tmp_path, flags):
    with pytest.raises(UserError, match=f"--{next(iter(flags))} .*: "):
        arguments(tmp_path, **flags)


def test_flags_of_training_are_ignored_without_one(tmp_path, capsys):
    vain = dict(learning_rate=1.0, eval_steps=3, save_steps=4, gradient_checkpointing=True, batch_seconds=9.0)
    args = arguments(tmp_path, do_train=False, data_seed=3, **vain)
    assert (args.learning_rate, args.eval_steps, args.gradient_checkpointing) == (3e-5, 1_000, False)
    vain, idle = capsys.readouterr().out.splitlines()
    assert "ignored: --learning_rate" in vain and "--save_steps, --batch_seconds (nothing is trained)" in vain
    assert idle.strip() == "ignored: --data_seed (not used here)"
    arguments(tmp_path)
    assert capsys.readouterr().out == ""


def test_results_are_strict_json(tmp_path):
    write_results(tmp_path, {"dev": {"loss": math.inf, "cer": [math.nan, 0.5]}}, [{"id": "é", "wer": math.inf}])

    def refuse(name):
        raise AssertionError(name)

    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert found == {"dev": {"loss": None, "cer": [None, 0.5]}}
    assert (tmp_path / "predictions.jsonl").read_text() == '{"id": "é", "wer": null}\n'


def test_empty_values_take_back_what_a_yaml_file_says():
    args = CTCArguments(train_hours=0.0, lm="", train_list="none")
    assert (args.train_hours, args.lm, args.train_list) == (None, None, None)


def test_normalisation_follows_the_folder(tmp_path):
    trained = CTCArguments(text_case="lower", drop_characters=".", fold_accents=True)
    write_config(tmp_path / "finetune_config.yaml", trained)
    (tmp_path / "config.json").touch()
    vocabulary = build_vocabulary(["AB"])
    followed = follow_text(CTCArguments(beam_size=7, drop_characters="!"), str(tmp_path), vocabulary)
    assert (followed.text_case, followed.fold_accents) == ("lower", True)
    assert (followed.drop_characters, followed.beam_size) == ("!", 7)
    (tmp_path / "fold-1" / "checkpoint-2").mkdir(parents=True)
    for inside in ("fold-1", "fold-1/checkpoint-2"):  # of a cross-validation
        assert follow_text(CTCArguments(), str(tmp_path / inside), vocabulary).text_case == "lower"
    (tmp_path / "finetune_config.yaml").unlink()
    assert follow_text(CTCArguments(), str(tmp_path), build_vocabulary(["ab"])).text_case == "lower"
    assert follow_text(CTCArguments(), str(tmp_path), build_vocabulary(["a b"], "tokens")).target_unit == "tokens"


def test_a_folder_that_holds_a_run_is_refused_unless_told(tmp_path):
    assert prepare_output_dir(arguments(tmp_path)) is None
    (tmp_path / "run" / "notes.txt").touch()
    assert prepare_output_dir(arguments(tmp_path)) is None  # a note is no run
    (tmp_path / "run" / "model.safetensors").touch()
    for resume in (None, "auto"):  # a finished model is not overwritten either
        with pytest.raises(UserError, match="already holds a run"):
            prepare_output_dir(arguments(tmp_path, resume_from_checkpoint=resume))
    assert prepare_output_dir(arguments(tmp_path, overwrite_output_dir=True)) is None
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_auto_takes_the_newest_whole_checkpoint(tmp_path):
    auto = arguments(tmp_path, resume_from_checkpoint="auto")
    assert prepare_output_dir(auto) is None
    make_checkpoint(tmp_path / "run" / "checkpoint-9")
    newest = make_checkpoint(tmp_path / "run" / "checkpoint-10")
    make_checkpoint(tmp_path / "run" / "checkpoint-11", leave_out="trainer_state.json")
    assert prepare_output_dir(auto) == str(newest)


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt"])
def test_auto_keeps_checkpoints_saved_without_a_state(tmp_path, missing):
    """As with --save_only_model and under FSDP; one that was cut short lacks `trainer_state.json`."""
    kept = make_checkpoint(tmp_path / "run" / "checkpoint-5", leave_out=missing)
    make_checkpoint(tmp_path / "run" / "checkpoint-6", leave_out="trainer_state.json")
    for wanted in ("auto", str(kept)):
        with pytest.raises(UserError, match=f"checkpoint-5 is not a whole .* lacks {missing}"):
            prepare_output_dir(arguments(tmp_path, resume_from_checkpoint=wanted))
    prepare_output_dir(arguments(tmp_path, resume_from_checkpoint="auto", overwrite_output_dir=True))
    assert not kept.exists()


def test_overwriting_does_not_delete_the_model_to_start_from(tmp_path):
    inside = make_checkpoint(tmp_path / "run" / "checkpoint-1")
    for source in (inside, tmp_path / "run"):
        with pytest.raises(UserError, match="holds the model to start from"):
            prepare_output_dir(arguments(tmp_path, model_name_or_path=str(source), overwrite_output_dir=True))
    assert inside.exists()


def test_the_written_configuration_starts_the_same_run(tmp_path):
    (tmp_path / "first.yaml").write_text("max_seconds: null\nsave_total_limit: null\n")
    given = [str(tmp_path / "first.yaml"),
             "--output_dir", str(tmp_path), "--train_data", "a.csv", "b.csv", "--validation_data", "v", "--use_cpu",
             "--drop_characters", "", "--eval_strategy", "epoch", "--save_strategy", "epoch", "--optim", "adafactor", "--model_name_or_path", "m", "--text_case", "lower", "--eval_steps", "7", "--save_steps", "7", "--bf16",
             "--lr_scheduler_type", "cosine", "--report_to", "none", "--freeze_feature_encoder", "false"]  # fmt: skip
    before = parse_command_line((CTCArguments, FineTuningArguments), given)
    write_config(tmp_path / "c.yaml", *before)
    written = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert set(written) <= {name[2:] for name in given if name[:2] == "--"} | {"max_seconds", "save_total_limit"}
    assert (written["eval_strategy"], written["optim"], written["max_seconds"]) == ("epoch", "adafactor", None)
    after = parse_command_line((CTCArguments, FineTuningArguments), [str(tmp_path / "c.yaml")])
    for a, b in zip(before, after, strict=True):
        different = {k for k, v in vars(a).items() if v != vars(b)[k]}
        assert different <= {"distributed_state", "accelerator_config"}, different
