"""Superposition in trainers of other packages."""
