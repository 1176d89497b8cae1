"""The arithmetic of the method: phases, folding of tokens to bags, documents, and the collator."""
