#!/usr/bin/env python
"""Plan a run before paying for it. `hf-tst plan` is the same.

python scripts/plan.py 270m-20k-tst --gpu b200 --num_gpus 8
python scripts/plan.py 270m-20k-tst --tst_bag_size 8 --json
"""

from __future__ import annotations

import sys

from hf_tst.cli.main import COMMANDS, run_command

if __name__ == "__main__":
    sys.exit(run_command("plan.py", COMMANDS["plan"], sys.argv[1:]))
