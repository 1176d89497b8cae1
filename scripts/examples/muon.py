"""Muon for the matrices between embedding and head, AdamW for all other weights, in both phases.

    python scripts/examples/muon.py --output_dir out --max_steps 1000 --learning_rate 1e-3

`--optimizer adamw` is the same run without Muon, to compare; `--evaluate True` holds 1 % of the documents out for it.
Needs torch 2.9. One process or DDP; weights that FSDP2 shards are refused.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import load_dataset
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_tst import TSTError, TSTTrainer, TSTTrainingArguments, pack_blocks, tokenize_documents


@dataclass
class Data:
    model: str = "HuggingFaceTB/SmolLM2-135M"
    dataset: str = "roneneldan/TinyStories"
    block_size: int = 512
    optimizer: Literal["muon", "adamw"] = "muon"
    evaluate: bool = False


class MuonAndAdamW(torch.optim.Optimizer):
    """Both as one optimizer: one learning rate schedule, and one state in checkpoints, which goes on over the switch."""

    def __init__(self, model: Any, lr: float, weight_decay: float) -> None:
        ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in ends]
        others = [p for p in model.parameters() if p.ndim != 2 or id(p) in ends]
        # With this adjustment Muon's steps are as long as AdamW's, so both have the same learning rate.
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._parts = muon, torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.95))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            raise TSTError("Muon has not been tried with sharded weights (FSDP2): use DDP, or AdamW alone.")
        for part in self._parts:
            part.step(closure)


def main() -> None:
    data, args = HfArgumentParser((Data, TSTTrainingArguments)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(data.model)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(data.model), dtype="float32")
    documents = load_dataset(data.dataset, split="train")
    held_out = None
    if data.evaluate:
        documents, held_out = documents.train_test_split(test_size=0.01, seed=0).values()
        held_out = pack_blocks(tokenize_documents(held_out, tokenizer), data.block_size)
    blocks = pack_blocks(tokenize_documents(documents, tokenizer), data.block_size)
    # Without an optimizer, TSTTrainer makes the one that `optim` names: AdamW.
    muon = MuonAndAdamW(model, args.learning_rate, args.weight_decay) if data.optimizer == "muon" else None
    trainer = TSTTrainer(
        model,
        args,
        train_dataset=blocks,
        eval_dataset=held_out,
        processing_class=tokenizer,
        optimizers=(muon, None),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if data.evaluate:
        trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
