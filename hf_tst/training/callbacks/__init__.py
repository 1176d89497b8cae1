"""What happens during training beside the steps themselves: one policy, one callback, one file."""
