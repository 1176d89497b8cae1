"""Write the memory and communication plan of the 3B and 10B-A1B recipes on 64 GPUs, `docs/scaling.md`."""

from __future__ import annotations

from dataclasses import dataclass

from tables import TableArguments, parse, write_table
from transformers.hf_argparser import HfArg

from hf_tst.planning.estimate import (
    Layout,
    ModelShape,
    communication_per_step,
    memory_per_gpu,
)
from hf_tst.planning.flops import flops_per_token
from hf_tst.pretraining.model import make_config
from hf_tst.pretraining.options import ModelArguments
from hf_tst.pretraining.recipes import RECIPES as FOLDER
from hf_tst.pretraining.recipes import read_config
from hf_tst.records.text_tables import markdown_table

GIB, TERA = 2**30, 10**12

RECIPES = {"3B": "3b-20k-tst.yaml", "10B-A1B": "10b-a1b-tst.yaml"}


def read_shape(name: str) -> ModelShape:
    values = read_config(str(FOLDER / RECIPES[name]))
    args = ModelArguments(model_type=values["model_type"], config_overrides=values["config_overrides"])
    return ModelShape.from_config(make_config(args))


SHAPES = {name: read_shape(name) for name in RECIPES}
BAG_SIZES = {"3B": 6, "10B-A1B": 16}
MICRO_BATCHES = {"3B": 2, "10B-A1B": 8}  # 2M and 8M latent tokens per step


@dataclass
class PlanArguments(TableArguments):
    """What is planned, and where the plan goes."""

    length: int = HfArg(default=4096, help="Latent positions per row, l.")
    rows: int = HfArg(default=4, help="Rows per micro-batch and GPU, B.")


def layouts(name: str, args: PlanArguments) -> dict[str, Layout]:
    def layout(shard_size: int, replicas: int) -> Layout:
        micro_batches = MICRO_BATCHES[name]
        return Layout(
            shard_size, replicas, args.rows, args.length, micro_batches, activation_checkpointing=True
        )

    return {"full shard over 64": layout(64, 1), "hybrid, 8 nodes of 8": layout(8, 8)}


def make_table(args: PlanArguments) -> str:
    """The plan as a Markdown table: memory in GiB per GPU, traffic in GB and TFLOPs per GPU and step."""
    header = (
        "model", "P (active)", "sharding", "latent tokens", "s", "state", "gathered", "unreduced", "activations", "loss",
        "embedding", "peak", "peak, logits whole", "gather + scatter", "between copies", "TFLOPs",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [header]
    for name, shape in SHAPES.items():
        for sharding, layout in layouts(name, args).items():
            traffic = communication_per_step(shape, layout)
            flops = layout.latent_tokens // layout.gpus * flops_per_token(shape, layout.length)
            for bag_size in (1, BAG_SIZES[name]):
                memory = memory_per_gpu(shape, layout, bag_size=bag_size)
                whole = memory_per_gpu(shape, layout, bag_size=bag_size, fused_loss=False)
                sizes = [
                    f"{memory[key] / GIB:.2f}"
                    for key in ("state", "gathered", "unreduced", "activations", "loss", "embedding", "peak")
                ]
                rows.append(
                    (
                        name,
                        f"{shape.parameters / 1e9:.2f}B ({shape.active_parameters / 1e9:.2f}B)",
                        sharding,
                        f"{layout.latent_tokens:,}",
                        str(bag_size),
                        *sizes,
                        f"{whole['peak'] / GIB:.2f}",
                        f"{(traffic['gather'] + traffic['scatter']) / 1e9:.1f}",
                        f"{traffic['replicate'] / 1e9:.1f}",
                        f"{flops / TERA:.0f}",
                    )
                )
    return markdown_table(rows)


def main() -> None:
    args = parse(__doc__, PlanArguments)
    write_table(args.output or "docs/scaling.md", "plan", make_table(args))


if __name__ == "__main__":
    main()
