"""Both phases in your own loop with Accelerate, without a Trainer. More processes make a larger step.

accelerate launch scripts/examples/accelerate_loop.py --output_dir out --max_steps 1000
"""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.optimization import get_scheduler

import hf_tst


@dataclass
class Arguments:
    output_dir: str
    model: str = "HuggingFaceTB/SmolLM2-135M"
    dataset: str = "roneneldan/TinyStories"
    block_size: int = 512
    max_steps: int = 1000
    batch_size: int = 8
    bag_size: int = 6
    phase_ratio: float = 0.3


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    accelerator = Accelerator()
    set_seed(0)  # every process makes the same weights
    schedule = hf_tst.PhaseSchedule(args.max_steps, args.phase_ratio, args.bag_size)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model), dtype="float32")

    tokens = hf_tst.tokenize_documents(load_dataset(args.dataset, split="train"), tokenizer)
    # Rows of l·s tokens from the first part of the text, rows of l tokens from the part behind it.
    rows = args.batch_size * accelerator.num_processes
    first_rows = schedule.switch_step * rows
    unread = range(first_rows * args.bag_size, schedule.blocks_needed(rows))
    bags = hf_tst.pack_blocks(tokens, args.block_size * args.bag_size).select(range(first_rows))
    blocks = hf_tst.pack_blocks(tokens, args.block_size).select(unread)

    def loader(data: Dataset, bag_size: int) -> DataLoader:
        return DataLoader(
            data, args.batch_size, True, collate_fn=hf_tst.DataCollatorForTokenSuperposition(bag_size)
        )

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    # One schedule for both phases. It is not prepared: accelerate would step it once per process.
    scheduler = get_scheduler("cosine", optimizer, args.max_steps // 20, args.max_steps)
    first, second = accelerator.prepare(loader(bags, args.bag_size), loader(blocks, 1))
    model, optimizer = accelerator.prepare(model, optimizer)

    def train(batches: DataLoader) -> None:
        for batch in batches:
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    with hf_tst.token_superposition(accelerator.unwrap_model(model), args.bag_size):
        train(first)
    train(second)  # here the model is what it was
    accelerator.unwrap_model(model).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
