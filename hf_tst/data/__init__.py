"""From text to blocks of tokens, and from blocks to the rows that each optimizer step reads."""
