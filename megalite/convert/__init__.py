"""Hugging Face, both ways: `importing` and `exporting` are the verbs, gpt2, llama and bert know the names, `files` the format."""
