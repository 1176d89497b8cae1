#!/usr/bin/env python
"""Plan a run before paying for it. `hf-tst plan` is the same.

python scripts/plan.py scripts/configs/recipes/270m-20k-tst.yaml --gpu b200 --num_gpus 8
python scripts/plan.py scripts/configs/recipes/270m-20k-tst.yaml --tst_bag_size 8 --json
"""

from __future__ import annotations

import sys

from hf_tst.cli.main import run_command
from hf_tst.cli.plan import main

if __name__ == "__main__":
    sys.exit(run_command("plan.py", main, sys.argv[1:]))
