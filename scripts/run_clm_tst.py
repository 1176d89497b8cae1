#!/usr/bin/env python
"""Pre-train a causal language model with Token Superposition Training.

    python scripts/run_clm_tst.py                                    # the quick start: no data needed
    python scripts/run_clm_tst.py config.yaml --max_steps 1000       # arguments of a YAML or JSON file, then flags
    python scripts/run_clm_tst.py --train_file corpus.jsonl --tokenizer_name gpt2 --model_type llama --max_steps 1000
    accelerate launch scripts/run_clm_tst.py config.yaml             # several GPUs

With neither --dataset_name nor --train_file it trains a small Llama on Python's standard library, with the
recipe hf_tst/pretraining/quick_start.yaml wherever a flag says nothing else. `hf-tst train` is the same.
"""

from __future__ import annotations

import sys

from hf_tst.cli.main import COMMANDS, run_command

if __name__ == "__main__":
    sys.exit(run_command("run_clm_tst.py", COMMANDS["train"], sys.argv[1:]))
