"""Imports inside the package go one way."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_tst"
# A module may import those of the lines above its own.
LAYERS = [
    {"version", "errors", "manifest"},
    {"checkpoint_folders", "exits", "bad_loss", "phases"},
    {
        "bags",
        "permutation",
        "documents",
        "probing",
        "preemption",
        "checkpoints",
        "sharding",
        "expert_load",
        "added_loss",
        "hardware",
        "published",
        "run_record",
        "evaluation",
        "next_token_metric",
    },
    {
        "kernels",
        "loss",
        "head",
        "embedding",
        "hub",
        "report",
        "packing",
        "quickstart",
        "text_files",
        "block_checks",
        "data_plan",
        "model_shape",
        "run_result",
        "reinitialize",
    },
    {"linear_loss", "model_card", "blocks", "data_position", "last_layer", "run_queue"},
    {"fused", "rows", "plan", "mtp_losses"},
    {"mtp"},
    {"superposition", "collator", "arguments", "run_plan", "stream", "flops", "budget"},
    {
        "callbacks",
        "document_attention",
        "run_data",
        "publishing",
        "mtp_training",
        "arms",
        "comparison",
        "lean_evaluation",
    },
    {"checkpointing"},
    {"guarding", "refusals"},
    {"trainer", "audit", "pretrain_arguments", "comparison_report"},
    {"pretrain"},
    {"planning", "run_card", "run_worker", "experiment", "sweep_report"},
    {"compare", "sweep"},
    {"cli"},
]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("scripts"), f"{path.name} imports scripts"
            if node.level:
                yield node.module.split(".")[0]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_modules_import_from_lower_layers_only(path):
    layer = next(i for i, names in enumerate(LAYERS) if path.stem in names)
    allowed = set().union(*LAYERS[:layer])
    assert set(imports(path)) <= allowed
