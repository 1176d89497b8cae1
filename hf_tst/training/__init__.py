"""`TSTTrainer`, its arguments and callbacks, the data of a run, and what it refuses."""
