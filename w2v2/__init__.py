"""wav2vec 2.0 pretraining on the Hugging Face stack."""

import os

__version__ = "0.1.0"

# OpenMP's waiting threads sleep instead of spinning, unless the user says otherwise. On a machine with other programs
# spinning threads made training 10 to 25 times slower. The variable has to be set before torch is loaded, so scripts
# import this package first.
if "GOMP_SPINCOUNT" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
