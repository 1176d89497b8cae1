"""From tensors to losses: the multi-hot cross entropy, of logits and fused with the head, and its kernels."""
