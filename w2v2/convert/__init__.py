"""Pretraining checkpoints of fairseq and SpeechBrain → the stock `Wav2Vec2ForPreTraining`, and back to fairseq.

In: a `.pt` file or a `CKPT+…` folder. Out: the model and its feature extractor; anything that does not fit is refused.
Read `weights` (what both share), then `fairseq` and `speechbrain` (names and options of each).
"""
