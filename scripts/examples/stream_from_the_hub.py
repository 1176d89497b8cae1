"""Pre-train on a data set too large to store: streamed, tokenized and packed during training, and resumable.

python scripts/examples/stream_from_the_hub.py --output_dir out --max_steps 1000 --save_steps 100
python scripts/examples/stream_from_the_hub.py --output_dir out --max_steps 1000 --save_steps 100 --resume_from_checkpoint last
"""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from hf_tst import BlockStream, TSTTrainer, TSTTrainingArguments, tokenize_documents


@dataclass
class Data:
    model: str = "HuggingFaceTB/SmolLM2-135M"
    dataset: str = "HuggingFaceFW/fineweb-edu"
    block_size: int = 1024


def main() -> None:
    data, args = HfArgumentParser((Data, TSTTrainingArguments)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(data.model)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(data.model), dtype="float32")

    # Every process, and every loader process of it, reads shards of its own. A shuffle buffer is not part of a
    # stream's state, so that shards, not rows, are what to shuffle.
    documents = load_dataset(data.dataset, split="train", streaming=True)
    blocks = BlockStream(tokenize_documents(documents, tokenizer), data.block_size)

    trainer = TSTTrainer(model=model, args=args, train_dataset=blocks, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
