"""`TSTTrainer`, its arguments and callbacks, its checkpoints, and what it does when a run breaks."""
