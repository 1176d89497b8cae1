"""A Trainer script with two class names changed: pre-train a new model on a data set of the Hub.

python scripts/examples/change_two_class_names.py --output_dir out --max_steps 1000 --learning_rate 1e-3
"""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_tst import TSTTrainer, TSTTrainingArguments, pack_blocks, tokenize_documents


@dataclass
class Data:
    model: str = "HuggingFaceTB/SmolLM2-135M"
    dataset: str = "roneneldan/TinyStories"
    block_size: int = 512


def main() -> None:
    data, args = HfArgumentParser((Data, TSTTrainingArguments)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(data.model)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(data.model), dtype="float32")

    documents = load_dataset(data.dataset, split="train")
    blocks = pack_blocks(tokenize_documents(documents, tokenizer), data.block_size)

    # Trainer(...) and TrainingArguments before; all else is as it was.
    trainer = TSTTrainer(model=model, args=args, train_dataset=blocks, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
