"""The arithmetic of the method: phases, folding tokens into bags, their weights, and the collator."""
