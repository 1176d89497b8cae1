"""Trains a tiny model and pushes it; run by `client.py`.

    python pushing_run.py OUTPUT_DIR '{"hub_strategy": "end", ...}'

Prints one line of JSON: what was raised, and whether the trained model is in the output folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from conftest import make_blocks, make_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_tst import TSTTrainer, TSTTrainingArguments


def train_and_push(output_dir: str, options: dict[str, Any]) -> dict[str, Any]:
    push = options.pop("push", {})
    model = make_model("llama", hidden_size=options.pop("hidden_size", 16))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, "w0")), eos_token="w1"
    )
    defaults = {
        "output_dir": output_dir, "max_steps": 6, "tst_bag_size": 4, "per_device_train_batch_size": 2,
        "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "steps",
        "save_steps": 3, "push_to_hub": True, "eval_strategy": "steps", "eval_steps": 3,
    }  # fmt: skip
    args = TSTTrainingArguments(**defaults | options)
    trainer = TSTTrainer(
        model, args, train_dataset=make_blocks(200), eval_dataset=make_blocks(4), processing_class=tokenizer
    )
    trainer.train()
    trainer.push_to_hub(**push)
    model.save_pretrained(Path(output_dir) / "reference")
    return {"step": trainer.state.global_step}


if __name__ == "__main__":
    try:
        result = train_and_push(sys.argv[1], json.loads(sys.argv[2]))
    except Exception as error:  # the tests look at what it was
        result = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(result | {"saved": (Path(sys.argv[1]) / "model.safetensors").is_file()}))
