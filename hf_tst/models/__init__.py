"""Hooks on one Transformers model, each with its undo: averaged input, replaced loss, fused head, shards, experts."""
