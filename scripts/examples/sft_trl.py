"""Continued pre-training with trl's SFTTrainer: bags first, then its own loss, metrics and options, such as `--model_init_kwargs`.

    python scripts/examples/sft_trl.py --output_dir out --max_steps 1000 --learning_rate 2e-5

The text is packed here: trl's packing puts documents in another order (`bfd`) or leaves rows that are not full (`wrapped`), and
superposition joins neighboring rows.
"""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_tst import TSTArguments, TSTTrainer, pack_blocks, tokenize_documents


@dataclass
class Data:
    model: str = "HuggingFaceTB/SmolLM2-135M"
    dataset: str = "roneneldan/TinyStories"
    block_size: int = 512


@dataclass
class TSTSFTConfig(TSTArguments, SFTConfig):
    """trl's defaults hold: bfloat16, gradient checkpointing."""


class TSTSFTTrainer(TSTTrainer, SFTTrainer):
    """Bags get the model's own loss, which superposition has replaced, and tokens that of SFTTrainer."""


def main() -> None:
    data, args = HfArgumentParser((Data, TSTSFTConfig)).parse_args_into_dataclasses()
    args.max_length = None  # the blocks are as long as they should be
    tokenizer = AutoTokenizer.from_pretrained(data.model)
    documents = load_dataset(data.dataset, split="train")
    blocks = pack_blocks(tokenize_documents(documents, tokenizer), data.block_size)

    # SFTTrainer's own collator, for recovery: it counts tokens by the attention mask. No block is padded.
    collator = DataCollatorForLanguageModeling(pad_token_id=tokenizer.eos_token_id)
    trainer = TSTSFTTrainer(data.model, args, collator, train_dataset=blocks, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
