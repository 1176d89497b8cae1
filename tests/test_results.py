"""The tables of results are those of the records, and each record has a configuration that makes it."""

import json
import shlex
from pathlib import Path

import pytest
import results

from hf_tst.experiments.compare import CompareArguments, SweepArguments
from hf_tst.experiments.options import parse_experiment

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "scripts" / "configs" / "comparisons"
RECORDS = sorted(path.name for path in results.RECORDS.iterdir())


@pytest.mark.parametrize(
    ("file", "name", "table"), results.all_tables(), ids=[name for _, name, _ in results.all_tables()]
)
def test_a_table_is_that_of_the_records(file, name, table):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert f"<!-- {name}: begin -->\n{table}\n<!-- {name}: end -->" in text, "run scripts/results.py"


@pytest.mark.parametrize("record", RECORDS)
def test_the_configuration_of_a_record_is_what_its_command_asked_for(record, monkeypatch):
    monkeypatch.chdir(ROOT)
    (path,) = (results.RECORDS / record).glob("*.json")
    _, kind, *flags = shlex.split(json.loads(path.read_text(encoding="utf-8"))["facts"]["command"])

    def parse(argv):
        arguments = CompareArguments if kind == "compare" else SweepArguments
        values, args = parse_experiment(argv, arguments)
        return {**values, "output_dir": ""}, args, args.select_arms(values)

    assert parse([str(CONFIGS / f"{record}.yaml")]) == parse(flags)
