"""Fine-tune a pretrained wav2vec 2.0 for speech recognition with CTC, and score it by word and character error rate.

    accelerate launch finetune_ctc.py CONFIG.yaml [--flag value …]        (or plain python)

The recipe is section 3.2 and appendix B of the wav2vec 2.0 paper (Baevski et al. 2020) with fairseq's values: a new linear layer on
top, one output a character; convs frozen; time and channel masks; a tri-stage learning rate. Greedy decoding, no language model.
"""

import json
import os
from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC, set_seed

from w2v2 import ctc
from w2v2.arguments import parse_command_line, run_script
from w2v2.audio import SAMPLING_RATE, probe
from w2v2.backbone import hide_padding, load_config, load_feature_extractor, load_with_head, min_samples, num_frames
from w2v2.errors import UserError
from w2v2.finetuning import CTCTrainer
from w2v2.finetuning_arguments import (
    CONFIG_FILE,
    PREDICTIONS_FILE,
    RESULTS_FILE,
    SKIPPED_FILE,
    CTCArguments,
    FineTuningArguments,
    prepare_output_dir,
    write_config,
)
from w2v2.hub_callback import HubCallback
from w2v2.manifest import load_manifest

CACHE_FOLDER = "_cache"  # in the output folder; `Trainer` pushes nothing that begins with an underscore


def main(argv: list[str] | None = None) -> None:
    text_args, args = parse_command_line((CTCArguments, FineTuningArguments), argv)
    checkpoint = prepare_output_dir(args)
    config = load_config(args.model_name_or_path, args.config_name, **args.model_changes())
    set_seed(args.seed)

    # Data: utterances with a transcript and audio that opens; the vocabulary from the training text alone.
    train = read_set("train", args.train_data, args, text_args)
    validation = read_set("validation", args.validation_data, args, text_args)
    tests = {name: read_set(name, [path], args, text_args) for name, path in name_sets(args.test_data).items()}
    vocabulary = ctc.build_vocabulary(train["text"])
    check_vocabulary(vocabulary, checkpoint)
    train = select_training(train, vocabulary, config, args)

    # Model: pretrained below, a new layer on top; an utterance's output does not depend on its neighbours in the batch.
    model = build_model(config, vocabulary, args, text_args)
    extractor = load_feature_extractor(config.name_or_path, config)
    as_audio = partial(
        ctc.SpeechDataset,
        vocabulary=vocabulary,
        feature_extractor=extractor,
        min_samples=min_samples(config),
        skip_log=Path(args.output_dir, SKIPPED_FILE),
    )
    sets = {"validation": validation, **tests}
    sets = {name: as_audio(ctc.longest_first(table), substitute=False) for name, table in sets.items()}

    # Train; the best checkpoint by validation WER is loaded at the end.
    hub = HubCallback(args)
    trainer = CTCTrainer(
        model,
        args,
        data_collator=ctc.collate_ctc,
        train_dataset=as_audio(train, substitute=True),
        eval_dataset=sets["validation"],
        processing_class=ctc.make_processor(vocabulary, extractor),
        vocabulary=vocabulary,
        callbacks=[hub],
    )
    describe(trainer, sets, checkpoint)
    if trainer.is_world_process_zero():
        write_config(Path(args.output_dir, CONFIG_FILE), text_args, args)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()

    # Score.
    results = score(trainer, sets)
    if trainer.is_world_process_zero():
        conclude(trainer, sets, results)
    hub.hand_over(args)
    trainer.end()


def build_model(
    config: Wav2Vec2Config, vocabulary: dict[str, int], args: FineTuningArguments, text_args: CTCArguments
) -> Wav2Vec2ForCTC:
    """Pretrained (or random) weights under a new layer with an output for each entry of the vocabulary."""
    config.update({
        "vocab_size": len(vocabulary),
        "pad_token_id": vocabulary[ctc.BLANK],
        "bos_token_id": None,
        "eos_token_id": None,
        "ctc_zero_infinity": text_args.ctc_zero_infinity,
        "ctc_loss_reduction": text_args.ctc_loss_reduction,
    })  # fmt: skip
    model = hide_padding(load_with_head(Wav2Vec2ForCTC, args.model_name_or_path, config, head=("lm_head",)))
    if args.freeze_feature_encoder:
        model.freeze_feature_encoder()
    return model


def read_set(name: str, paths: list[str], args: FineTuningArguments, text_args: CTCArguments) -> Dataset:
    """Utterances of one set that have a transcript and audio that opens; the others are counted, and listed if unreadable.

    Raises UserError where more than `max_skipped_fraction` of them are unreadable.
    """
    with args.main_process_first():
        cache_dir = Path(args.output_dir, CACHE_FOLDER)
        table, skipped = load_manifest(paths, data_root=args.data_root, cache_dir=cache_dir, probe=probe)
    label = ", ".join(paths)
    num_utterances = len(table) + len(skipped)
    table, unopened = ctc.drop_unreadable(table)
    skipped += unopened
    if skipped and args.process_index == 0:
        ctc.log_skipped(Path(args.output_dir, SKIPPED_FILE), skipped)
    if len(skipped) > args.max_skipped_fraction * num_utterances:
        first = skipped[0]
        raise UserError(
            f"{label}: {len(skipped)} of {num_utterances} utterances have unreadable audio, the first {first['audio']}: "
            f"{first['reason']}; mend the paths (--data_root?) or raise --max_skipped_fraction, now {args.max_skipped_fraction}"
        )
    table, dropped = ctc.prepare_texts(table, label, text_args.text_case, text_args.drop_characters)
    say(args, f"{name:>12}: {describe_table(table)}, {len(skipped)} unreadable, {dropped['no_text']} without text")
    return table


def select_training(
    train: Dataset, vocabulary: dict[str, int], config: Wav2Vec2Config, args: FineTuningArguments
) -> Dataset:
    """Training utterances within the lengths and long enough for their text."""
    kept, dropped = ctc.select_trainable(
        train, vocabulary, partial(num_frames, config), args.min_seconds, args.max_seconds
    )
    listed = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not len(kept):
        raise UserError(f"--train_data: every utterance was dropped ({listed}): see --min_seconds and --max_seconds")
    if dropped:
        say(args, f"     dropped: {listed} (training)")
    return kept


def name_sets(paths: list[str]) -> dict[str, str]:
    """Set name → manifest: the file's name without its ending, numbered where that would name two."""
    named: dict[str, str] = {}
    for path in paths:
        name = stem = Path(path).stem
        number = 2
        while name in named or name in ("train", "validation", "run"):
            name, number = f"{stem}_{number}", number + 1
        named[name] = path
    return named


def check_vocabulary(vocabulary: dict[str, int], checkpoint: str | None) -> None:
    """A run can only go on with the vocabulary that it began with."""
    if checkpoint is None:
        return
    saved = json.loads(Path(checkpoint, "vocab.json").read_text(encoding="utf-8"))
    if saved != vocabulary:
        raise UserError(
            f"{checkpoint}: made with another vocabulary than --train_data's; resume with the same training text"
        )


def describe(trainer: CTCTrainer, sets: dict[str, ctc.SpeechDataset], checkpoint: str | None) -> None:
    """What this run will do, on the console."""
    args, train, vocabulary = trainer.args, trainer.train_dataset, trainer.vocabulary
    start = args.model_name_or_path or f"random weights of {args.config_name}"
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    convs = "convs frozen" if args.freeze_feature_encoder else "convs learn"
    encoder = f", encoder frozen for {args.freeze_encoder_steps} updates" if args.freeze_encoder_steps else ""
    say(args, f"       model: {start}, {parameters:.2f} M parameters, {convs}{encoder}")
    say(args, f"  vocabulary: {len(vocabulary)}: {''.join(list(vocabulary)[3:])}")
    for name, data in sets.items():
        if unknown := ctc.unknown_characters(data.table["text"], vocabulary):
            listed = ", ".join(f"{character!r} × {count}" for character, count in list(unknown.items())[:10])
            say(args, f"     warning: {name} has characters that the training text lacks, always wrong: {listed}")
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    seconds = batch * sum(train.lengths) / len(train) / SAMPLING_RATE
    updates = args.max_steps if args.max_steps > 0 else round(args.num_train_epochs * len(train) / batch)
    resumed = f", resumed from {checkpoint}" if checkpoint else ""
    say(args, f"     updates: {updates} of {batch} utterances ({seconds:.0f} s), "
              f"{updates * batch / len(train):.1f} epochs{resumed}")  # fmt: skip


def score(trainer: CTCTrainer, sets: dict[str, ctc.SpeechDataset]) -> dict[str, dict]:
    """Error rates of each set, and `predictions.jsonl`, with the model as it is now."""
    results, lines = {}, []
    for name, data in sets.items():
        output = trainer.predict(data, metric_key_prefix=name)
        keys = ("wer", "cer", "loss", "utterances")
        results[name] = {key: output.metrics[f"{name}_{key}"] for key in keys}
        for row, hypothesis in zip(data.table, output.predictions, strict=True):
            if hypothesis is not None:  # None: the audio was unreadable
                line = {"set": name, "id": row["id"], "reference": row["text"], "hypothesis": hypothesis}
                lines.append(line | {"wer": ctc.word_error_rate(row["text"], hypothesis)})
    if trainer.is_world_process_zero():
        with open(Path(trainer.args.output_dir, PREDICTIONS_FILE), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return results


def conclude(trainer: CTCTrainer, sets: dict[str, ctc.SpeechDataset], results: dict[str, dict]) -> None:
    """`results.json`, and its gist on the console."""
    args, train, vocabulary = trainer.args, trainer.train_dataset, trainer.vocabulary
    run = {
        "model": args.model_name_or_path,
        "config": args.config_name,
        "updates": trainer.state.global_step,
        "best_update": trainer.state.best_global_step,
        "train_utterances": len(train),
        "train_hours": round(sum(train.lengths) / SAMPLING_RATE / 3600, 4),
        "vocabulary_size": len(vocabulary),
        "seed": args.seed,
        "skipped_audio": len(ctc.read_skipped(Path(args.output_dir, SKIPPED_FILE))),
        "unknown_characters": {
            name: unknown
            for name, data in sets.items()
            if (unknown := ctc.unknown_characters(data.table["text"], vocabulary))
        },
    }
    path = Path(args.output_dir, RESULTS_FILE)
    path.write_text(json.dumps(results | {"run": run}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, result in results.items():
        say(
            args, f"{name:>12}: WER {result['wer']:.1%}, CER {result['cer']:.1%} over {result['utterances']} utterances"
        )
    say(args, f"        best: update {run['best_update']}; model and {RESULTS_FILE} in {os.fspath(args.output_dir)}")


def describe_table(table: Dataset) -> str:
    hours = sum(table["num_samples"]) / SAMPLING_RATE / 3600
    return f"{len(table)} utterances, {hours:.2f} h"


def say(args: FineTuningArguments, line: str) -> None:
    """A line on the console, once."""
    if args.process_index == 0:
        print(line, flush=True)


if __name__ == "__main__":
    run_script(main)
