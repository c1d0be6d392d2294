"""The model that labels: `Wav2Vec2ForSequenceClassification` with a new head, or with one that was trained before.

The stock model averages a projection of the frames over time, padding left out, and has one linear layer above.
"""

from collections.abc import Sequence

from torch import nn
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

from w2v2.errors import UserError
from w2v2.finetune.arguments import FineTuningArguments
from w2v2.model.feature_encoder import hide_padding
from w2v2.model.loading import load_config, load_with_head

HEAD = ("projector", "classifier", "layer_weights")


def folder_labels(source: str | None) -> list[str]:
    """The labels of a classifier, in its order; none of any other model."""
    config = load_config(source, None) if source else None
    if config is None or Wav2Vec2ForSequenceClassification.__name__ not in (config.architectures or ()):
        return []
    return [str(label) for _, label in sorted(config.id2label.items())]


def build_classifier(
    config: Wav2Vec2Config, labels: Sequence[str], args: FineTuningArguments
) -> Wav2Vec2ForSequenceClassification:
    """Pretrained (or random) weights under a head with an output for each label.

    The head is new, unless the folder's own has the same labels and shape. An utterance's output does not depend on
    its neighbours in the batch. Below a weighted sum of layers the encoder is frozen: it stays in evaluation mode
    whatever `train()` says, so it neither drops nor masks anything.
    """
    source = args.model_name_or_path
    keeps_head = _fits_head(config, labels, args)
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    model = hide_padding(load_with_head(Wav2Vec2ForSequenceClassification, source, config, () if keeps_head else HEAD))
    if config.use_weighted_layer_sum and not keeps_head:
        nn.init.constant_(model.layer_weights, 1 / len(model.layer_weights))
    if config.use_weighted_layer_sum:
        model.freeze_base_model()
        model.wav2vec2.register_forward_pre_hook(_stay_in_evaluation, prepend=True)
    elif args.freeze_feature_encoder:
        model.freeze_feature_encoder()
    return model


def _fits_head(config: Wav2Vec2Config, labels: Sequence[str], args: FineTuningArguments) -> bool:
    """Whether the folder that training starts from has a head for these labels; what comes of it is said."""
    source = args.model_name_or_path
    if not (theirs := folder_labels(source)):
        return False
    before = load_config(source, None)
    differs = [key for key in ("classifier_proj_size", "use_weighted_layer_sum")
               if getattr(before, key) != getattr(config, key)]  # fmt: skip
    listed = ", ".join(theirs[:10]) + " …" * (len(theirs) > 10)
    reason = f"other labels ({listed})" if theirs != list(labels) else f"another {differs[0]}" if differs else ""
    args.print_once(f"        head: new, as {source} has {reason}" if reason else
                    f"        head: kept from {source}, which has the same {len(theirs)} labels")  # fmt: skip
    return not reason


def load_classifier(source: str) -> Wav2Vec2ForSequenceClassification:
    """A fine-tuned model as it is."""
    if not folder_labels(source):
        raise UserError(
            f"--do_train false: {source} labels nothing: give a folder that finetune_classification.py made"
        )
    return hide_padding(load_with_head(Wav2Vec2ForSequenceClassification, source, load_config(source, None), head=()))


def _stay_in_evaluation(base: nn.Module, inputs: tuple) -> None:
    base.eval()
