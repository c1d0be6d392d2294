"""Fine-tune a pretrained wav2vec 2.0 for speech recognition with CTC, and score it by word and character error rate.

    accelerate launch finetune_ctc.py CONFIG.yaml [--flag value …]        (or plain python)
    python finetune_ctc.py --do_train false --model_name_or_path FINE_TUNED --test_data a.csv b.csv --output_dir scores

The recipe is section 3.2 and appendix B of the wav2vec 2.0 paper (Baevski et al. 2020) with fairseq's values: a new
linear layer on top, one output a character; convs frozen; time and channel masks; a tri-stage learning rate. Greedy
decoding, and with `--lm` a beam search with an n-gram beside it.
"""

import w2v2  # noqa: F401  # isort: skip  # before torch: sets how OpenMP's threads wait

from pathlib import Path

from transformers import set_seed

from w2v2.cli import parse_command_line, run_script
from w2v2.errors import UserError
from w2v2.evaluate.scores import RATES
from w2v2.finetune.arguments import (
    CONFIG_FILE,
    SKIPPED_FILE,
    FineTuningArguments,
    prepare_output_dir,
    write_config,
)
from w2v2.finetune.beam_search import load_decoder
from w2v2.finetune.ctc import CTCTrainer, build_recogniser, keep_head, load_recogniser, read_head
from w2v2.finetune.ctc_data import SpeechDataset, collate_speech, longest_first, read_sets
from w2v2.finetune.evaluation import check_metric
from w2v2.finetune.subsets import select_training
from w2v2.finetune.text import CTCArguments, build_vocabulary, follow_text, make_processor, read_vocabulary
from w2v2.finetune.transcription import describe_units, score
from w2v2.hub.push import HubCallback
from w2v2.model.feature_encoder import min_samples
from w2v2.model.loading import load_config, load_feature_extractor
from w2v2.report.page import report_run
from w2v2.train.events import note_finish, note_start


def main(argv: list[str] | None = None) -> None:
    text_args, args = parse_command_line((CTCArguments, FineTuningArguments), argv)
    if args.do_train:
        train(text_args, args)
    else:
        evaluate(text_args, args)


def train(text_args: CTCArguments, args: FineTuningArguments) -> None:
    """Train on one set, choose the checkpoint on another, score the others."""
    check_metric(args.metric_for_best_model, RATES[text_args.target_unit])
    checkpoint = prepare_output_dir(args)
    config = load_config(args.model_name_or_path, args.config_name, **args.model_changes())
    set_seed(args.seed)

    # 1. Data: utterances with a transcript and audio that opens; the vocabulary from the training text alone.
    theirs = read_head(config, args)
    resumed = read_vocabulary(checkpoint) if checkpoint else None
    tables, text_args, left_out = read_sets(args, text_args, resumed or theirs)
    train_table, dropped = select_training(tables.pop("train"), config, args, text_args)
    vocabulary = build_vocabulary(train_table["text"], text_args.target_unit)
    is_kept = theirs is not None and keep_head(theirs, vocabulary, args)
    vocabulary = theirs if is_kept else vocabulary
    if resumed and resumed != vocabulary:
        raise UserError(f"{checkpoint}: made with another vocabulary than --train_data's; resume with the same text")
    decoder = load_decoder(text_args, vocabulary, args)
    extractor = load_feature_extractor(config.name_or_path, config)
    shared = dict(min_samples=min_samples(config), skip_log=Path(args.output_dir, SKIPPED_FILE))
    perturbed = dict(speeds=args.speed_perturbation, seed=args.seed)
    train_set = SpeechDataset(train_table, vocabulary, extractor, substitute=True, **perturbed, **shared)
    sets = {
        name: SpeechDataset(longest_first(table), vocabulary, extractor, substitute=False, **shared)
        for name, table in tables.items()
    }

    # 2. Model: pretrained below, a new layer on top.
    model = build_recogniser(config, vocabulary, args.model_name_or_path, text_args, is_new=not is_kept)
    if args.freeze_feature_encoder:
        model.freeze_feature_encoder()

    # 3. Train: the best checkpoint by validation WER (PER for tokens) is loaded at the end.
    hub = HubCallback(args)
    trainer = CTCTrainer(
        model, args, data_collator=collate_speech, train_dataset=train_set, eval_dataset=sets["validation"],
        processing_class=make_processor(vocabulary, extractor), vocabulary=vocabulary, callbacks=[hub],
        chunk_seconds=text_args.chunk_seconds, blank_warning_steps=text_args.blank_warning_steps,
    )  # fmt: skip
    trainer.dropped = left_out["train"] | dropped
    trainer.describe(checkpoint)
    describe_units(sets, trainer)
    trainer.check_resume(checkpoint)
    if args.process_index == 0:
        write_config(Path(args.output_dir, CONFIG_FILE), text_args, args)
        note_start(args, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()

    # 4. Evaluate: every set with these weights.
    score(trainer, sets, decoder, text_args)
    hub.hand_over(args)
    if args.process_index == 0:
        note_finish(args, trainer.state.global_step)
        report_run(args)
    trainer.end()


def evaluate(text_args: CTCArguments, args: FineTuningArguments) -> None:
    """Score the sets that have transcripts with a fine-tuned model, transcribe those that have none."""
    prepare_output_dir(args)

    # 1. Model: what was fine-tuned, its vocabulary, and how the transcripts were normalised for it.
    source = args.model_name_or_path
    vocabulary = read_vocabulary(source)
    text_args = follow_text(text_args, source, vocabulary)
    decoder = load_decoder(text_args, vocabulary, args)
    model = load_recogniser(source, vocabulary)
    extractor = load_feature_extractor(source, model.config)

    # 2. Data: utterances with audio that opens.
    shared = dict(min_samples=min_samples(model.config), skip_log=Path(args.output_dir, SKIPPED_FILE))
    tables, text_args, _ = read_sets(args, text_args)
    sets = {
        name: SpeechDataset(longest_first(table), vocabulary, extractor, substitute=False, **shared)
        for name, table in tables.items()
    }

    # 3. Evaluate.
    trainer = CTCTrainer(
        model, args, data_collator=collate_speech, eval_dataset=next(iter(sets.values())),  # `Trainer` wants one
        processing_class=make_processor(vocabulary, extractor), vocabulary=vocabulary,
        chunk_seconds=text_args.chunk_seconds,
    )  # fmt: skip
    describe_units(sets, trainer)
    if args.process_index == 0:
        write_config(Path(args.output_dir, CONFIG_FILE), text_args, args)
        note_start(args)
    score(trainer, sets, decoder, text_args)
    if args.process_index == 0:
        note_finish(args)
        report_run(args)
    trainer.end()


if __name__ == "__main__":
    run_script(main)
