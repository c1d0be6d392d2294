"""wav2vec 2.0 pretraining on the Hugging Face stack."""

import os
from pathlib import Path

__version__ = "0.1.0"

# Where scripts and configs/ lie: in an installed package inside it (setup.py), otherwise at the root of the checkout.
_HERE = Path(__file__).resolve().parent
ROOT = _HERE / "shipped" if (_HERE / "shipped").is_dir() else _HERE.parent

# OpenMP's waiting threads spin for a moment and then sleep, unless the user says otherwise. On a machine with other
# programs endless spinning made training 10 to 25 times slower. The variables have to be set before torch is loaded, so
# scripts import this package first. GNU's OpenMP heeds the count, others the policy.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
