"""Checkpoints that are complete or not there, the run that each belongs to, and a Trainer that writes and resumes them."""
