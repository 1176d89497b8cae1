"""Many runs beside each other: arms, budgets, a queue of processes, and their report."""
