#!/usr/bin/env python
"""Run the package's checks and benchmarks on your device, and record the results.

    python scripts/gpu_evidence.py --slice a --output_dir runs/evidence                    # is it right, and is it fast
    python scripts/gpu_evidence.py --slice b --output_dir runs/evidence --corpus FOLDER    # does it help
    python scripts/gpu_evidence.py --slice a --output_dir runs/rehearsal --device cpu --tiny

Every step is a process of its own with a limit of seconds, and steps go in order of worth. `results.json` and
`results.md` are written again as each step ends. A step that fails is recorded with the end of its output, and the next
one starts. A second call with the same folder runs what has not passed. Nothing is downloaded, and the package need not
be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "accelerate", "liger-kernel", "cut-cross-entropy")
TAIL = 4000  # characters of a step's output on record
LOG_TAIL = 200_000  # characters of it in output.log
SHORTEST = 3  # seconds under which no step is worth a start

DEVICE = (
    "import torch; x = torch.ones(9, 9, device='{device}'); assert (x @ x == 9).all(); "
    "print(torch.cuda.get_device_name() if x.is_cuda else 'CPU', 'CUDA', torch.version.cuda)"
)
TINY_COMPARISON = (
    " --config_overrides vocab_size=500,hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2,"
    "num_key_value_heads=2 --block_size 16 --max_steps 20 --warmup_steps 2 --bf16 False"
    """ --lr_scheduler_kwargs '{"num_decay_steps": 4}'"""
)


class Step(NamedTuple):
    """One process.

    Args:
        name (`str`): What it is called on record.
        command (`list[str]`): Its command, in which OUT is the folder of results and WORK that of everything else.
        limit (`float`): Seconds it may take.
        keep (`tuple[str, ...]`): Files of WORK to copy to OUT after it.
    """

    name: str
    command: list[str]
    limit: float
    keep: tuple[str, ...] = ()


def slice_a(args: argparse.Namespace) -> list[Step]:
    """Is it right, and is it fast: the checks, head and loss, and whole steps of the 270M recipe's model."""
    on_gpu = args.device == "cuda"

    def tests(file: str, choice: str) -> list[str]:
        pytest = shlex.split("python -m pytest -q -m full -p no:cacheprovider")
        return [*pytest, f"tests/gpu/{file}", "-k", choice]

    def loss(options: str) -> list[str]:
        shapes = "--rows 64 --hidden_size 16 --vocab_size 500 --rounds 1"
        if not args.tiny:
            shapes = "--rows 8192 --hidden_size 576 2048 --vocab_size 128256 32000 --rounds 3 --repeats 4"
        places = f"--device {args.device} --dtype bfloat16 --csv OUT/loss.csv"
        return shlex.split(f"python scripts/benchmark_loss.py {places} {shapes} {options}")

    def train(variants: str) -> list[str]:
        peak = f" --peak_tflops {args.peak_tflops}" if args.peak_tflops else ""
        size = " --tiny True" if args.tiny else ""
        options = f"--device {args.device} --csv OUT/step.csv{peak}{size}"
        return shlex.split(f"python scripts/benchmark_trainer.py {options} --variants {variants}")

    steps = [
        Step("kernel", tests("test_on_device.py", "kernel or operator"), 60),
        Step("training", tests("test_on_device.py", "not kernel and not operator and not compiled"), 60),
        Step("step", train("plain recovery superposition"), 75),
        Step("step, loader processes", train("superposition --num_workers 2"), 45),
        Step("step, Liger", train("liger"), 45),
        Step("loss", loss("--bag_sizes 1 6 16 --candidates products one_target gather loop"), 100),
        Step("loss, others", loss("--bag_sizes 1 --candidates liger cce"), 45),
        Step("FSDP2", tests("test_fsdp_gpu.py", "test_fsdp2_trains_through_the_switch and bf16"), 60),
        Step("compiled", tests("test_on_device.py", "compiled and not off"), 75),
        Step("loss, chunks", loss("--bag_sizes 1 --candidates ours --chunk_rows 512 1024 2048 4096"), 45),
        Step("memory", tests("test_fused_gpu.py", "not kernel_tests"), 60),
        Step("step, compiled", train("superposition --bag_sizes 6 --torch_compile True"), 120),
        Step("plain step, compiled", train("plain --torch_compile True"), 120),
        Step("step, Liger, compiled", train("liger --torch_compile True"), 120),
        Step("kernel tests", tests("test_fused_gpu.py", "kernel_tests"), 120),
    ]
    only_gpu = ("step, Liger", "loss, others", "step, Liger, compiled", "memory", "kernel tests")
    return [step for step in steps if on_gpu or step.name not in only_gpu]


def slice_b(args: argparse.Namespace) -> list[Step]:
    """Does it help: TST, also with other weights, and the baseline at equal FLOPs, then the other arms, in as many steps as there is time."""
    parts, held_out = (
        shlex.join(map(str, sorted(args.corpus.resolve().glob(name)))) for name in ("part*", "valid*")
    )
    pages = tuple(f"comparison/comparison.{ending}" for ending in ("json", "md", "png"))

    def compare(share: float, options: str) -> list[str]:
        command = (
            "python scripts/compare.py scripts/configs/comparisons/100m-gpu.yaml --train_file WORK/train.npy"
        )
        command += " --validation_file WORK/valid.npy --output_dir WORK/comparison"
        command += TINY_COMPARISON if args.tiny else ""
        # One run alone leaves much of a large GPU idle at this size.
        command += f" {options} --processes 3 --seconds {share * args.seconds:.0f}"
        return shlex.split(command + (" --use_cpu True" if args.device == "cpu" else ""))

    pack = "python scripts/pack_ids.py --overwrite True --inputs"
    seeds = "0" if args.tiny else "0,1,2"
    others = "baseline,tst,tst-recency,tst-r0.2-s4,mtp-0.1,tst+mtp-0.1"
    return [
        Step("text", shlex.split(f"{pack} {parts} --eos_id 0 --seed 0 --output WORK/train.npy"), 90),
        Step("held-out text", shlex.split(f"{pack} {held_out} --output WORK/valid.npy"), 30),
        Step(
            "baseline and TST",
            compare(0.8, "--seeds 0 --arms baseline,tst,tst-recency"),
            0.84 * args.seconds,
            pages,
        ),
        Step("other arms", compare(0.12, f"--seeds {seeds} --arms {others}"), 0.13 * args.seconds, pages),
    ]


SLICES: dict[str, Callable[[argparse.Namespace], list[Step]]] = {"a": slice_a, "b": slice_b}


def run(step: Step, seconds: float, out: Path, work: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run a step for `seconds` at most, with all that it starts; what goes on record of it."""
    command = [word.replace("OUT/", f"{out}/").replace("WORK/", f"{work}/") for word in step.command]
    if command[0] == "python":
        command[0] = sys.executable
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = "passed" if process.wait(seconds) == 0 else f"failed, exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            # Cut by the time of the whole, it has not shown to be too slow.
            status = f"failed, not done in {step.limit:.0f} s" if seconds >= step.limit else "not reached"
        finally:
            # Compilers have processes in its group. Those of launchers and of a comparison's queue have sessions of their own.
            for pid in descendants(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - LOG_TAIL))
        text = output.read().decode(errors="replace")
    for name in step.keep:
        if (work / name).exists():
            shutil.copy(work / name, out)
    with (out / "output.log").open("a", encoding="utf-8") as log:
        log.write(f"\n== {step.name}: {status}\n{text}")
    return result_of(step, status, round(time.monotonic() - start, 1), text[-TAIL:])


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have; none on systems without `/proc`."""
    found = [pid]
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def result_of(step: Step, status: str, seconds: float = 0, output: str = "") -> dict[str, Any]:
    return {"status": status, "seconds": seconds, "command": shlex.join(step.command), "output": output}


def as_markdown(records: dict[str, Any]) -> str:
    """All records as tables, then the end of each step's output."""
    lines = ["# Evidence on a device"]
    for name, record in records.items():
        steps = record["steps"]
        circumstances = [
            record["date"],
            steps["device"]["output"].strip(),
            record["machine"],
            record["versions"],
        ]
        lines += ["", f"## {name}", "", f"`{record['command']}`", "", "; ".join(circumstances), ""]
        lines += ["| step | result | seconds | command |", "|---|---|---|---|"]
        for step, result in steps.items():
            lines.append(f"| {step} | {result['status']} | {result['seconds']} | `{result['command']}` |")
        for step, result in steps.items():
            lines += ["", f"### {step}", "", "```", result["output"].strip().replace("```", "'''"), "```"]
    return "\n".join(lines) + "\n"


def write_atomically(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def main(arguments: Sequence[str] | None = None) -> None:
    deadline = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--slice", choices=SLICES, required=True, help="a: is it right and fast; b: does it help"
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="folder of the results of one or more calls"
    )
    parser.add_argument("--seconds", type=float, default=270, help="seconds that the whole call may take")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the same steps in small, as a rehearsal")
    parser.add_argument(
        "--corpus", type=Path, help="slice b: a folder of token ids in files part* and valid*"
    )
    parser.add_argument(
        "--work_dir", type=Path, default=ROOT / "runs" / "gpu_evidence", help="slice b: for its runs"
    )
    parser.add_argument(
        "--peak_tflops", type=float, help="peak of the device in TFLOP/s, if its name does not tell"
    )
    args = parser.parse_args(arguments)
    if args.slice == "b" and args.corpus is None:
        parser.error("--slice b trains on text: give --corpus a folder of token ids.")
    deadline += args.seconds

    out, work = args.output_dir.resolve(), args.work_dir.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    record = records.setdefault(
        f"slice {args.slice}, {args.device}{', tiny' if args.tiny else ''}", {"steps": {}}
    )
    record |= {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": versions(),
    }
    environment = {"CUDA_VISIBLE_DEVICES": "0"} | os.environ if args.device == "cuda" else dict(os.environ)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment |= {"HF_TST_TEST_DEVICE": args.device, "HF_HUB_OFFLINE": "1"}

    check = Step("device", ["python", "-c", DEVICE.format(device=args.device)], 60)
    for step in [check, *SLICES[args.slice](args)]:
        if record["steps"].get(step.name, {}).get("status") == "passed":
            continue
        print(f"{step.name} ...", end=" ", flush=True)
        left = deadline - time.monotonic()
        if left < SHORTEST:
            result = result_of(step, "not reached")
        else:
            # A CPU is for rehearsals, and slower.
            step = step._replace(limit=step.limit * (4 if args.device == "cpu" else 1))
            result = run(step, min(step.limit, left), out, work, environment)
        print(f"{result['status']}, {result['seconds']} s", flush=True)
        record["steps"][step.name] = result
        write_atomically(path, json.dumps(records, indent=1))
        write_atomically(out / "results.md", as_markdown(records))
    print(as_markdown(records))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # ends the step, too
    main()
