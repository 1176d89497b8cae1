"""The console command `hf-tst`."""
