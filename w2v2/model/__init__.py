"""The model: micro-batches of masked utterances in, sums of loss terms out; stock weights in and out.

In reading order: `feature_encoder` (convs), `transformer` (context, attention), `objective` (codes, contrast,
penalties), `loading` (configurations and weights, checked), `pretraining` (the forward pass that joins them), `cpu`
(kernels and memory where there is no accelerator), `kernels` and `fused` (Triton). Every part is tested against the
stock model.
"""
