"""Scoring a checkpoint: loss, perplexity and bits per byte, also as a metric of `evaluate`."""
