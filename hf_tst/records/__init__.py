"""What a run leaves on record: its notes in `trainer_state.json`, phase table, curve, model card, and the Hub."""
