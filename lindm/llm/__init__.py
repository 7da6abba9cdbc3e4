"""Language models that decide: a decoder in Flax NNX, weights in and out, tokens with labels, and fine-tuning at any scale.

Nothing heavy is imported here.
"""

import os

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is not there, as it is meant to be
