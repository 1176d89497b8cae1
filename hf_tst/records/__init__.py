"""What a run leaves on record: its entry in the log history, phase table, curve, model card, and the Hub."""
