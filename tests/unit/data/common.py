"""Common words, for texts that no rule of cleaning has anything against."""

WORDS = (
    "river", "stone", "house", "green", "open", "water", "light", "small", "large", "carry", "under", "over", "train", "quick", "brown",
    "window", "garden", "letter", "paper", "music",
)  # fmt: skip
