"""From text to blocks of tokens, on disk or cut from a stream. Knows nothing of superposition."""
