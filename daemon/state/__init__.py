"""What was learned, kept: checkpoints, where they lie, and who starts from them."""
