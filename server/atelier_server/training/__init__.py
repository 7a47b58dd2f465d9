"""The teacher: pictures in, checkpoints out."""
