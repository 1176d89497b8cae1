"""Multi-token prediction: extra heads on a model, and their losses."""
