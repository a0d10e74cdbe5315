"""What a run tells about itself: metrics on the console, in JSONL and in TensorBoard."""
