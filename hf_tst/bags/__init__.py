"""The arithmetic of the method: phases, folding of tokens to bags, weights of their tokens, and the collator."""
