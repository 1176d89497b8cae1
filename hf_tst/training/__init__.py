"""`TSTTrainer`, its arguments and callbacks, the data and checkpoint folders of a run, and what it refuses."""
