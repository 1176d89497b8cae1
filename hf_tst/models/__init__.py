"""Hooks on one Transformers model that can be undone: averaged input, replaced loss, fused head, shards, experts."""
