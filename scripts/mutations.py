"""Write the table of `docs/mutations.md`: lines that matter, broken one at a time, and the first test that fails.

Each break is made in a copy of the tracked files, so that the checkout stays as it is. A row whose last column is empty
is a break that no test of its files has noticed: write that test.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tables import ROOT, TableArguments, parse, write_table
from transformers.hf_argparser import HfArg


@dataclass(frozen=True)
class Mutation:
    """One line broken.

    Args:
        subject (`str`): What the line is there for.
        file (`str`): Its module.
        line (`str`): The text to replace, which is there once.
        broken (`str`): What it becomes.
        tests (`str`): Test files that are about it.
    """

    subject: str
    file: str
    line: str
    broken: str
    tests: str


MUTATIONS = [
    Mutation("switch step", "bags/phases.py", "step < self.switch_step else", "step <= self.switch_step else", "phases trainer"),
    Mutation("mean of a bag", "bags/folding.py", ".sum(dim=-2, dtype=torch.float32) / bags.shape[-1]", ".sum(dim=-2, dtype=torch.float32)", "bags superposition"),
    Mutation(
        "its sum in float32", "bags/folding.py", "held.float() if weights is None",
        "held.to(embedded.dtype) if weights is None", "bags documents",
    ),
    Mutation("weights of a bag's targets", "losses/kernels/torch_multi_hot.py", "torch.where(valid, weights, 0.0)", "torch.where(valid, weights.mean(), 0.0)", "kernels linear_loss"),
    Mutation("the same without fusion", "losses/multi_hot.py", "weights = weights * valid", "weights = weights.mean() * valid", "loss"),
    Mutation("target of a bag", "bags/folding.py", "torch.cat([bags[:, 1:], last], dim=1)", "torch.cat([bags[:, :-1], last], dim=1)", "bags collator superposition"),
    Mutation("targets of a window", "bags/folding.py", "torch.cat([tokens[:, 1:], beyond], dim=1).unfold", "torch.cat([tokens, beyond[:, 1:]], dim=1).unfold", "bags collator superposition"),
    Mutation("targets of a step, accumulated", "training/target_bags.py", "torch.stack(parts).sum()", "torch.stack(parts).mean()", "trainer"),
    Mutation("order of the data, by seed", "batches/read_order.py", "(self.seed % 2**64, int(data_pass),", "(0, int(data_pass),", "data audit"),
    Mutation("order of the data, by step", "batches/read_order.py", "(step * self.rows_per_step +", "((step + 1) * self.rows_per_step +", "data audit"),
    Mutation("no token twice in a pass", "batches/read_order.py", "used + self._permute(", "self._permute(", "data"),
    Mutation("a resumed run's place in the data", "training/train_dataloader.py", "epoch_steps, lambda: trainer.state.global_step)", "epoch_steps, lambda: 0)", "resume audit"),
    Mutation("end of a pass with bags", "models/superposition.py", "self._bags = self._looked_up = None\n", "pass\n", "superposition"),
    Mutation("undo of the loss", "models/temporary.py", "                entries[name] = before[name]", "                pass", "superposition fused"),
    Mutation("gradient of the fused loss, softmax", "losses/kernels/torch_multi_hot.py", "logits *= weight * factor / total", "logits *= factor / total", "kernels linear_loss fused"),
    Mutation("gradient of the fused loss, targets", "losses/kernels/torch_multi_hot.py", "-factor * row_weights)", "-factor * weight / labels.shape[-1] * valid)", "kernels linear_loss fused"),
    Mutation("its scale by the caller's", "losses/linear.py", "torch.mul(gradient, scale, out=scaled)", "gradient.to(dtype)", "linear_loss fused"),
    Mutation("manifest, read at resume", "checkpoints/manifest.py", "if _hash(folder / name) != expected:", "if not _hash(folder / name):", "checkpoints"),
    Mutation("position that a checkpoint must be at", "checkpoints/folders.py", 'state.get("global_step") != step', 'state.get("global_step") is None', "checkpoints"),
    Mutation("target of an extra head", "mtp/losses.py", "range(2, count + 2)", "range(1, count + 1)", "mtp"),
    Mutation("files of one kind", "data/files.py", "if len(kinds) > 1 or kinds[0]", "if kinds[0]", "text_files"),
    Mutation("a changed file is read again", "data/files.py", "state.st_size, state.st_mtime_ns)", "0)", "text_files"),
    Mutation("no file without text", "data/text_files.py", "found = found or _has_text(array)", "found = True", "text_files"),
    Mutation("checkpoints of another run", "checkpoints/run_identity.py", "return starts == run[: len(starts)] and", "return starts == starts and", "checkpoints"),
    Mutation("a finished run is kept", "pretraining/overwrite.py", '("trainer_state.json", "config.json", "adapter_config.json")', '("adapter_config.json",)', "console"),
    Mutation("a replaced run comes back", "pretraining/overwrite.py", "        path.rename(folder / path.name)", "        pass", "console"),
    Mutation("one line per log", "training/callbacks/console.py", 'if not (control.should_evaluate and "loss" in logs):', "if logs:", "console"),
]  # fmt: skip


@dataclass
class MutationArguments(TableArguments):
    """What is broken, and where the table goes."""

    only: str = HfArg(default="", help="Only the lines whose subject holds this text, printed.")
    core: bool = HfArg(
        default=False, help="Run the core alone, what `pytest` runs without a marker; printed."
    )


def copy_checkout(folder: Path) -> None:
    """Copy the tracked files, as they are now."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in names.stdout.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def first_red_test(mutation: Mutation, checkout: Path, core: bool = False) -> str:
    """Break the line, run its tests until one fails, mend the line; the test's name, or nothing.

    With `core`, the core's tests of its files, and then the whole core.
    """
    path = checkout / "hf_tst" / mutation.file
    whole = path.read_text(encoding="utf-8")
    if whole.count(mutation.line) != 1:
        raise ValueError(
            f"hf_tst/{mutation.file} holds {mutation.line!r} {whole.count(mutation.line)} times."
        )
    path.write_text(whole.replace(mutation.line, mutation.broken), encoding="utf-8")
    try:
        if not core:
            return first_failure(files_of(mutation), checkout)
        return first_failure(files_of(mutation), checkout, "not full") or first_failure(
            ["tests"], checkout, "not full"
        )
    finally:
        path.write_text(whole, encoding="utf-8")


def files_of(mutation: Mutation) -> list[str]:
    """The test files about a mutation, from the checkout's root."""
    found = [path for name in mutation.tests.split() for path in ROOT.glob(f"tests/**/test_{name}.py")]
    if len(found) != len(mutation.tests.split()):
        raise ValueError(f"There are not all test files of {mutation.tests!r}.")
    return [path.relative_to(ROOT).as_posix() for path in found]


def first_failure(files: list[str], checkout: Path, marker: str = "full or not full") -> str:
    """Run test files until a test fails; its name, or nothing."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command = [*pytest, "-m", marker, *files]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1, 5) or (done.returncode == 1) != bool(failed):
        raise RuntimeError(f"{' '.join(command)} did not run:\n{done.stdout}{done.stderr}")
    return failed[1] if failed else ""


def row(mutation: Mutation, test: str) -> str:
    """A line of the table."""
    line, broken = (" ".join(text.split()) for text in (mutation.line, mutation.broken))
    cells = (mutation.subject, f"`{mutation.file}`", f"`{line}`", f"`{broken}`", f"`{test}`" if test else "")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    args = parse(__doc__, MutationArguments)
    rows = ["| what the line is for | file | line | broken | first test that went red |", "|" + " --- |" * 5]
    with tempfile.TemporaryDirectory() as folder:
        copy_checkout(Path(folder))
        chosen = [mutation for mutation in MUTATIONS if args.only in mutation.subject]
        for tests in dict.fromkeys(tuple(files_of(mutation)) for mutation in chosen):
            if red := first_failure(
                list(tests), Path(folder), "not full" if args.core else "full or not full"
            ):
                raise RuntimeError(f"{red} is red though nothing is broken yet.")
        for mutation in chosen:
            rows.append(row(mutation, first_red_test(mutation, Path(folder), args.core)))
            print(rows[-1], file=sys.stderr, flush=True)
    # A part of the table does not take the place of the whole.
    output = "-" if args.only or args.core else args.output or "docs/mutations.md"
    write_table(output, "mutations", "\n".join(rows))


if __name__ == "__main__":
    main()
