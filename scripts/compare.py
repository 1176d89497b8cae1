#!/usr/bin/env python
"""Compare TST with a baseline on one configuration and one budget. `hf-tst compare` is the same.

python scripts/compare.py --output_dir runs/compare
python scripts/compare.py 30m-laptop-tst --learning_rates 1e-3,2e-3 --seeds 0,1,2 --budget data
"""

from __future__ import annotations

import sys

from hf_tst.cli.main import COMMANDS, run_command

if __name__ == "__main__":
    sys.exit(run_command("compare.py", COMMANDS["compare"], sys.argv[1:]))
