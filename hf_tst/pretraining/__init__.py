"""From text to a trained model: the options and the run of `hf-tst train`."""
