"""Superposition inside of trainers that are configured elsewhere."""
