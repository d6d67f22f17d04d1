"""From the user's data to a space and tensors, and back."""
