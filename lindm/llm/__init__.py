"""Language models as policies: a decoder in Flax NNX, model files, tokenization, and supervised fine-tuning at any scale.

Nothing heavy is imported here.
"""

import os

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # silences a warning that torch is not installed
