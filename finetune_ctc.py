"""Fine-tune a pretrained wav2vec 2.0 for speech recognition with CTC, and score it by word and character error rate.

    accelerate launch finetune_ctc.py CONFIG.yaml [--flag value …]        (or plain python)
    python finetune_ctc.py --do_train false --model_name_or_path FINE_TUNED --test_data a.csv b.csv --output_dir scores

The recipe is section 3.2 and appendix B of the wav2vec 2.0 paper (Baevski et al. 2020) with fairseq's values: a new linear layer on
top, one output a character; convs frozen; time and channel masks; a tri-stage learning rate. Greedy decoding, and with `--lm` a
beam search with an n-gram beside it.
"""

import w2v2  # noqa: F401  # isort: skip  # before torch: sets how OpenMP's threads wait

import json
from pathlib import Path

from transformers import Wav2Vec2Config, Wav2Vec2ForCTC, set_seed

from w2v2.cli import parse_command_line, run_script
from w2v2.data.audio import SAMPLING_RATE
from w2v2.errors import UserError
from w2v2.evaluate.error_rates import RATES
from w2v2.finetune import ctc_data
from w2v2.finetune.arguments import (
    CONFIG_FILE,
    FineTuningArguments,
    check_metric,
    prepare_output_dir,
    write_config,
)
from w2v2.finetune.ctc import CTCTrainer
from w2v2.finetune.ctc_data import as_audio, read_sets, say, select_training
from w2v2.finetune.recognition import conclude, describe_unknown, load_decoder, score
from w2v2.finetune.task_arguments import CTCArguments, follow_folder
from w2v2.finetune.text import BLANK, build_vocabulary, make_processor, read_vocabulary
from w2v2.hub.push import HubCallback
from w2v2.model.config import load_config
from w2v2.model.feature_encoder import hide_padding
from w2v2.model.loading import load_feature_extractor, load_with_head


def main(argv: list[str] | None = None) -> None:
    text_args, args = parse_command_line((CTCArguments, FineTuningArguments), argv)
    if not args.do_train:
        return evaluate(text_args, args)
    if args.metric_for_best_model in ("wer", "eval_wer"):
        args.metric_for_best_model = RATES[text_args.target_unit][0]
    check_metric(args.metric_for_best_model, RATES[text_args.target_unit])
    checkpoint = prepare_output_dir(args)
    config = load_config(args.model_name_or_path, args.config_name, **args.model_changes())
    set_seed(args.seed)

    # Data: utterances with a transcript and audio that opens; the vocabulary from the training text alone.
    sets = read_sets(args, text_args)
    train = select_training(sets.pop("train"), config, args, text_args)
    vocabulary = build_vocabulary(train["text"], text_args.target_unit)
    check_vocabulary(vocabulary, checkpoint)
    decoder = load_decoder(text_args, vocabulary, args)

    # Model: pretrained below, a new layer on top; an utterance's output does not depend on its neighbours in the batch.
    model = build_model(config, vocabulary, args, text_args)
    extractor = load_feature_extractor(config.name_or_path, config)
    sets = {name: as_audio(table, vocabulary, extractor, config, args) for name, table in sets.items()}

    # Train; the best checkpoint by validation WER (PER for tokens) is loaded at the end.
    hub = HubCallback(args)
    trainer = CTCTrainer(
        model,
        args,
        data_collator=ctc_data.collate_ctc,
        train_dataset=as_audio(train, vocabulary, extractor, config, args, train=True),
        eval_dataset=sets["validation"],
        processing_class=make_processor(vocabulary, extractor),
        vocabulary=vocabulary,
        callbacks=[hub],
        blank_warning_steps=text_args.blank_warning_steps,
    )
    describe(trainer, checkpoint)
    describe_unknown(sets, trainer)
    if trainer.is_world_process_zero():
        write_config(Path(args.output_dir, CONFIG_FILE), text_args, args)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()

    # Score.
    results = score(trainer, sets, decoder, text_args)
    if trainer.is_world_process_zero():
        conclude(trainer, sets, results)
    hub.hand_over(args)
    trainer.end()


def evaluate(text_args: CTCArguments, args: FineTuningArguments) -> None:
    """Score the sets that have transcripts with a fine-tuned model, transcribe those that have none."""
    prepare_output_dir(args)
    vocabulary = read_vocabulary(args.model_name_or_path)
    text_args = follow_folder(text_args, args.model_name_or_path, vocabulary)
    config = load_config(args.model_name_or_path, None)
    check_head(config, vocabulary, args.model_name_or_path)
    decoder = load_decoder(text_args, vocabulary, args)
    model = hide_padding(load_with_head(Wav2Vec2ForCTC, args.model_name_or_path, config, head=()))
    extractor = load_feature_extractor(args.model_name_or_path, config)
    sets = read_sets(args, text_args)
    sets = {name: as_audio(table, vocabulary, extractor, config, args) for name, table in sets.items()}
    trainer = CTCTrainer(
        model,
        args,
        data_collator=ctc_data.collate_ctc,
        eval_dataset=next(iter(sets.values())),  # `Trainer` wants one
        processing_class=make_processor(vocabulary, extractor),
        vocabulary=vocabulary,
    )
    describe_unknown(sets, trainer)
    if trainer.is_world_process_zero():
        write_config(Path(args.output_dir, CONFIG_FILE), text_args, args)
    results = score(trainer, sets, decoder, text_args)
    if trainer.is_world_process_zero():
        conclude(trainer, sets, results)
    trainer.end()


def build_model(
    config: Wav2Vec2Config, vocabulary: dict[str, int], args: FineTuningArguments, text_args: CTCArguments
) -> Wav2Vec2ForCTC:
    """Pretrained (or random) weights under a new layer with an output for each entry of the vocabulary."""
    config.update({
        "vocab_size": len(vocabulary),
        "pad_token_id": vocabulary[BLANK],
        "bos_token_id": None,
        "eos_token_id": None,
        "ctc_zero_infinity": text_args.ctc_zero_infinity,
        "ctc_loss_reduction": text_args.ctc_loss_reduction,
    })  # fmt: skip
    model = hide_padding(load_with_head(Wav2Vec2ForCTC, args.model_name_or_path, config, head=("lm_head",)))
    if args.freeze_feature_encoder:
        model.freeze_feature_encoder()
    return model


def check_vocabulary(vocabulary: dict[str, int], checkpoint: str | None) -> None:
    """A run can only go on with the vocabulary that it began with."""
    if checkpoint is None:
        return
    saved = json.loads(Path(checkpoint, "vocab.json").read_text(encoding="utf-8"))
    if saved != vocabulary:
        raise UserError(
            f"{checkpoint}: made with another vocabulary than --train_data's; resume with the same training text"
        )


def check_head(config: Wav2Vec2Config, vocabulary: dict[str, int], source: str) -> None:
    """A fine-tuned model has an output for each entry of its vocabulary, and its blank where that says."""
    if config.vocab_size != len(vocabulary) or config.pad_token_id != vocabulary[BLANK]:
        raise UserError(
            f"--model_name_or_path {source}: vocab.json has {len(vocabulary)} entries with the blank at {vocabulary[BLANK]}, config.json "
            f"{config.vocab_size} outputs with the blank at {config.pad_token_id}: not of one model"
        )


def describe(trainer: CTCTrainer, checkpoint: str | None) -> None:
    """What this run will do, on the console."""
    args, train, vocabulary = trainer.args, trainer.train_dataset, trainer.vocabulary
    start = args.model_name_or_path or f"random weights of {args.config_name}"
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    convs = "convs frozen" if args.freeze_feature_encoder else "convs learn"
    encoder = f", encoder frozen for {args.freeze_encoder_steps} updates" if args.freeze_encoder_steps else ""
    say(args, f"       model: {start}, {parameters:.2f} M parameters, {convs}{encoder}")
    units = [unit for unit in vocabulary if not unit.startswith("<")]
    say(args, f"  vocabulary: {len(vocabulary)}: {('' if '|' in vocabulary else ' ').join(units)}")
    heard = sum(train.lengths) / SAMPLING_RATE
    if args.batch_seconds:
        updates_per_epoch = len(trainer.sampler)
        batch = f"{heard / updates_per_epoch:.0f} s, micro-batches of at most {args.micro_batch_seconds:g} s"
        if updates_per_epoch == 1 and heard < 0.9 * args.batch_seconds:
            batch += f" (all there is; --batch_seconds asks for {args.batch_seconds:g})"
    else:
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        updates_per_epoch = len(train) / size
        batch = f"{size} utterances ({size * heard / len(train):.0f} s)"
    updates = args.max_steps if args.max_steps > 0 else round(args.num_train_epochs * updates_per_epoch)
    resumed = f", resumed from {checkpoint}" if checkpoint else ""
    say(args, f"     updates: {updates} of {batch}, {updates / updates_per_epoch:.1f} epochs{resumed}")


if __name__ == "__main__":
    run_script(main)
