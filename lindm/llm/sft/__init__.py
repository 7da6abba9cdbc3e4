"""Supervised fine-tuning: options, examples, packing, loss, step, trainer, checkpoints."""
