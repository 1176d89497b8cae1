"""The real client of the Hub, in a process that has the address of a Hub in its environment.

    python client.py < jobs

Each line of `jobs` is a JSON list: a folder for what is printed, changes of the environment, a kind, and its arguments. A kind
is `"train"`, with an output folder and options, which trains a tiny model and pushes it; or the path of a script. Every job has a
process of its own, forked from this one, whose imports take seconds; a line of its exit status says that it is over.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib.pyplot  # noqa: F401  every job draws a curve
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


def work(kind: str, arguments: list[Any]) -> None:
    """Do a job; of training, print one line of JSON: what was raised, and whether the trained model is in its folder."""
    if kind != "train":
        sys.argv = [kind, *arguments]
        runpy.run_path(kind, run_name="__main__")
        return
    try:
        result = train_and_push(*arguments)
    except Exception as error:  # the tests look at what it was
        result = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(result | {"saved": (Path(arguments[0]) / "model.safetensors").is_file()}))


def fork(folder: str, environment: dict[str, str], kind: str, arguments: list[Any]) -> int:
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    os.chdir(folder)
    work(kind, arguments)
    sys.exit(0)


if __name__ == "__main__":
    for line in sys.stdin:
        print(fork(*json.loads(line)), flush=True)
