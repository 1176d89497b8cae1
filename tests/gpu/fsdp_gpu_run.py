"""A run of TSTTrainer under whatever `accelerate launch` set up; started by `test_fsdp_gpu.py`.

Arguments: a folder for results, and a JSON object of what differs from the plain run.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from conftest import losses, make_blocks, make_model

from hf_tst import TSTTrainer, TSTTrainingArguments

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}


def train(out: Path, options: dict[str, Any], resume: str | None = None) -> TSTTrainer:
    options = dict(options)
    model_type, attention = options.pop("model_type", "llama"), options.pop("attention", "sdpa")
    model = make_model(model_type, **SIZES, **options.pop("config", {}))
    model.set_attn_implementation(attention)
    args = TSTTrainingArguments(
        output_dir=str(out / ("resumed" if resume else "run")),
        max_steps=8,
        tst_phase_ratio=3 / 8,
        tst_bag_size=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=os.environ["HF_TST_TEST_DEVICE"] == "cpu",
        **options,
    )
    # Two blocks again and again: what trains learns them.
    trainer = TSTTrainer(model, args, train_dataset=make_blocks(2, length=32) * 100)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def main(out: Path, options: dict[str, Any]) -> None:
    trainer = train(out, options)
    trainer.save_model(str(out / "final"))
    accelerator = trainer.accelerator
    result = {
        "distributed": accelerator.distributed_type.value,
        "fsdp2": accelerator.is_fsdp2,
        "sharded": all(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters()),
        "losses": losses(trainer),
    }
    checkpoint = str(out / "run" / "checkpoint-3")
    result["resumed"] = losses(train(out, options, checkpoint))
    (out / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
