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
        "token_files",
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
        "next_token_metric",
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
        "comparison",
        "lean_evaluation",
    },
    {"checkpointing"},
    {"guarding", "refusals"},
    {"trainer", "audit", "pretrain_arguments", "comparison_report"},
    {"pretrain", "arms"},
    {"planning", "run_card", "run_worker", "experiment", "sweep_report"},
    {"timing"},
    {"compare", "sweep"},
    {"cli"},
]


def imports(path):
    """Modules of the package that a file imports; of kernels, those outside their folder."""
    dots = len(path.relative_to(PACKAGE).parents)  # of an import of the package's own modules
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            top, _, rest = name.partition(".")
            assert top != "scripts", f"{path.name} imports scripts"
            if top == "hf_tst":
                yield rest.split(".")[0]
        if isinstance(node, ast.ImportFrom) and node.level == dots:
            yield node.module.split(".")[0]


MODULES = [*sorted(PACKAGE.glob("[!_]*.py")), *sorted(PACKAGE.glob("kernels/*.py"))]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_import_from_lower_layers_only(path):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    layer = next(i for i, names in enumerate(LAYERS) if name in names)
    allowed = set().union(*LAYERS[:layer])
    assert set(imports(path)) <= allowed
