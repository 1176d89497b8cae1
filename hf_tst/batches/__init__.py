"""From blocks of tokens to the batches of each optimizer step: which blocks it reads, and where a run resumes in its data."""
