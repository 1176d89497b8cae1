"""Costs on paper: FLOPs, memory and traffic of a run, before it is started."""
