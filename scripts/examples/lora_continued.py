"""Continued pre-training of a trained model with LoRA; the adapter is an ordinary one of PEFT.

python scripts/examples/lora_continued.py --output_dir adapter --max_steps 1000 --learning_rate 2e-4
"""

from dataclasses import dataclass

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_tst import TSTTrainer, TSTTrainingArguments, pack_blocks, tokenize_documents


@dataclass
class Data:
    model: str = "HuggingFaceTB/SmolLM2-135M"
    dataset: str = "roneneldan/TinyStories"
    block_size: int = 512
    rank: int = 16


def main() -> None:
    data, args = HfArgumentParser((Data, TSTTrainingArguments)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(data.model)
    model = AutoModelForCausalLM.from_pretrained(data.model)
    # The head stays as it is: an adapter on it would keep it from being fused with the loss.
    lora = LoraConfig(task_type="CAUSAL_LM", r=data.rank, target_modules="all-linear")
    model = get_peft_model(model, lora)

    documents = load_dataset(data.dataset, split="train")
    blocks = pack_blocks(tokenize_documents(documents, tokenizer), data.block_size)

    trainer = TSTTrainer(model=model, args=args, train_dataset=blocks, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        # The base model with the adapter merged into it, which needs no PEFT to be loaded.
        model.merge_and_unload().save_pretrained(f"{args.output_dir}/merged")
        tokenizer.save_pretrained(f"{args.output_dir}/merged")


if __name__ == "__main__":
    main()
