"""Language models that decide: a decoder in Flax NNX, weights in and out, tokens with labels, and fine-tuning at any scale."""
