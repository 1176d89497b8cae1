"""Pre-train a model that does not fit on one GPU. The launcher sets the number of GPUs and the sharding, not the script.

    accelerate launch --config_file hf_tst/pretraining/accelerate/fsdp2.yaml --num_processes 8 \
        scripts/examples/fsdp2.py --output_dir out --max_steps 1000 --bf16 True --dataset_config sample-10BT

The weights are made on every process and then sharded; `save_model` writes one ordinary checkpoint, whatever
`fsdp_state_dict_type` says, and checkpoints of training resume on another number of GPUs.
"""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

from hf_tst import TSTTrainer, TSTTrainingArguments, pack_blocks, tokenize_documents


@dataclass
class Data:
    model: str = "HuggingFaceTB/SmolLM3-3B"
    dataset: str = "HuggingFaceFW/fineweb-edu"
    dataset_config: str | None = None
    block_size: int = 4096


def main() -> None:
    data, args = HfArgumentParser((Data, TSTTrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)  # every process makes the same weights
    tokenizer = AutoTokenizer.from_pretrained(data.model)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(data.model), dtype="float32")

    # The first process writes the cache that the others read, who wait for `ddp_timeout` seconds at most.
    with args.main_process_first(desc="packing"):
        documents = load_dataset(data.dataset, data.dataset_config, split="train")
        blocks = pack_blocks(tokenize_documents(documents, tokenizer), data.block_size)

    trainer = TSTTrainer(model=model, args=args, train_dataset=blocks, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
