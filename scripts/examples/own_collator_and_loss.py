"""Your own collator for recovery and evaluation, and your own term in the loss of both phases.

    python scripts/examples/own_collator_and_loss.py --output_dir out --max_steps 1000

The term holds log Z = logsumexp of the logits near zero (the z-loss of PaLM, arXiv 2204.02311). It reads logits, which the
fused loss never makes: hence `tst_fused_loss="off"`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import load_dataset
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_tst import TSTTrainer, TSTTrainingArguments, pack_blocks, tokenize_documents


@dataclass
class Data:
    model: str = "HuggingFaceTB/SmolLM2-135M"
    dataset: str = "roneneldan/TinyStories"
    block_size: int = 512


class SteadyTrainer(TSTTrainer):
    z_weight = 1e-4

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            z = outputs.logits.float().logsumexp(-1).square().mean()
            loss = loss + self.z_weight / self.args.gradient_accumulation_steps * z
        return (loss, outputs) if return_outputs else loss


def collate(blocks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Batches `(B, L)` of recovery and evaluation; a row's second token, which the first alone predicts, is no target here."""
    input_ids = torch.as_tensor([list(block["input_ids"]) for block in blocks])
    labels = input_ids.clone()
    labels[:, :2] = -100
    return {"input_ids": input_ids, "labels": labels}


def main() -> None:
    data, args = HfArgumentParser((Data, TSTTrainingArguments)).parse_args_into_dataclasses()
    args.tst_fused_loss = "off"
    tokenizer = AutoTokenizer.from_pretrained(data.model)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(data.model), dtype="float32")
    documents = load_dataset(data.dataset, split="train")
    blocks = pack_blocks(tokenize_documents(documents, tokenizer), data.block_size)
    trainer = SteadyTrainer(model, args, collate, train_dataset=blocks, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
