"""What a run leaves: its notes in `trainer_state.json`, phase table, curve, model card, and the Hub; and tables of text."""
