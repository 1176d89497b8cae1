"""One rank of a small run: trains, and writes which rows it was fed and how the weights ended."""

import json
import sys

import torch
from conftest import losses, make_model
from test_audit import SOURCES, Recorder

from hf_tst import TSTTrainer, TSTTrainingArguments

options = json.loads(sys.argv[1])
resume = options.pop("resume_from", None)
source = options.pop("source")
model = make_model("llama")
args = TSTTrainingArguments(**options)
recorder = Recorder(model)
trainer = TSTTrainer(model, args, train_dataset=SOURCES[source](), callbacks=[recorder])
trainer.train(resume_from_checkpoint=resume)
rank = args.process_index
torch.save(
    {
        "rows": recorder.rows,
        "weights": model.state_dict(),
        "losses": losses(trainer),
        "history": trainer.state.log_history,
    },
    f"{args.output_dir}/rank_{rank}.pt",
)
if torch.distributed.is_initialized():  # a rank that leaves while another still talks to it makes gloo abort
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
