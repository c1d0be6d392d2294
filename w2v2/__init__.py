"""wav2vec 2.0 pretraining on the Hugging Face stack."""

__version__ = "0.1.0"
