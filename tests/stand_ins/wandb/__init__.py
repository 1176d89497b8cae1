"""A stand-in for wandb, which is not installed to test: only as much of it as Transformers' callback calls."""

import sys
from types import ModuleType

from recording import anything, record

run = anything.run
config_util = ModuleType("wandb.sdk.lib.config_util")
config_util.ConfigError = type("ConfigError", (Exception,), {})
sys.modules |= {"wandb.sdk": anything, "wandb.sdk.lib": anything, config_util.__name__: config_util}


def log(values, *args, **kwargs):
    record("wandb", values)


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(anything, name)
