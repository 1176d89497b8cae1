"""The configurations of `accelerate launch`: what accelerate reads in them, and what they make of it."""

import os
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import CPUOffloadPolicy

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "hf_tst" / "pretraining" / "accelerate"
# distributed type, processes, machines
EXPECTED = {
    "single_gpu": ("NO", 1, 1),
    "ddp": ("MULTI_GPU", 8, 1),
    "fsdp2": ("FSDP", 8, 1),
    "fsdp2_activation_checkpointing": ("FSDP", 8, 1),
    "fsdp2_cpu_offload": ("FSDP", 8, 1),
    "fsdp2_multi_node": ("FSDP", 64, 8),
    "fsdp2_hybrid": ("FSDP", 64, 8),
}
SHARDED = [name for name in EXPECTED if name.startswith("fsdp2")]


def command(name):
    """The arguments of the command in the comment at the head of a configuration."""
    lines = []
    for line in (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    rest = "\n".join(lines).partition("accelerate launch ")[2]
    rest = rest.replace("\\\n", " ").replace("$NODE", "0").replace("$FIRST_NODE", "127.0.0.1")
    return shlex.split(rest)


@pytest.fixture
def environment(monkeypatch):
    """What `accelerate launch` would put into the environment of its processes."""

    def prepare(name):
        args = launch_command_parser().parse_args(command(name))
        args, _, _ = _validate_launch_command(args)
        for key, value in prepare_multi_gpu_env(args).items():
            if key.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_")):
                monkeypatch.setenv(key, value)
        return args

    monkeypatch.chdir(ROOT)
    saved = dict(os.environ)
    yield prepare
    for key in set(os.environ) - set(saved):
        monkeypatch.delenv(key)


def test_every_configuration_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == EXPECTED[name]
    assert config.mixed_precision == "bf16"
    assert not config.use_cpu


@pytest.mark.parametrize("name", EXPECTED)
def test_its_comment_has_the_command_that_uses_it(name, environment):
    assert f"hf_tst/pretraining/accelerate/{name}.yaml" in command(name)
    args = environment(name)
    assert args.training_script == "scripts/run_clm_tst.py"
    assert args.num_processes == EXPECTED[name][1]


@pytest.mark.parametrize("name", SHARDED)
def test_the_plugin_that_it_makes(name, environment):
    environment(name)
    plugin = FullyShardedDataParallelPlugin()
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert "SHARDED" in str(plugin.state_dict_type)
    assert plugin.activation_checkpointing == ("activation_checkpointing" in name)
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy) == ("cpu_offload" in name)
    assert "transformer_auto_wrap" in re.sub(r"\W", "_", str(plugin.auto_wrap_policy))


def test_hybrid_sharding_replicates_over_nodes(environment):
    environment("fsdp2_hybrid")
    mesh = ParallelismConfig()
    assert (mesh.dp_replicate_size, mesh.dp_shard_size, mesh.total_size) == (8, 8, 64)
    assert mesh.fsdp_dim_names[0] == "dp_replicate"  # of the mesh, the dimension that FSDP2 replicates over


@pytest.mark.parametrize("name", ["ddp", "single_gpu"])
def test_without_fsdp_nothing_is_sharded(name, environment):
    environment(name)
    assert os.environ.get("ACCELERATE_USE_FSDP", "false") == "false"
