"""`python -m hf_tst`: the console command `hf-tst`, also under `accelerate launch -m`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
