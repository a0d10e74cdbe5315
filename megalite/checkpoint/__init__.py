"""Checkpoints on any mesh: `store` writes and reads them, `slices` says which blocks of a tensor a rank holds."""
