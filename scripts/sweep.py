#!/usr/bin/env python
"""Sweep bag size, phase ratio, weighting and mode. `hf-tst sweep` is the same.

python scripts/sweep.py --output_dir runs/sweep --bag_sizes 2,4,6 --phase_ratios 0.2,0.3
python scripts/sweep.py 30m-laptop-tst --weightings uniform,power_law --processes 2
"""

from __future__ import annotations

import sys

from hf_tst.cli.main import COMMANDS, run_command

if __name__ == "__main__":
    sys.exit(run_command("sweep.py", COMMANDS["sweep"], sys.argv[1:]))
