"""Text in, microbatches out: prepare -> shards -> mixture -> causal | masked -> loader. Knows no model and no rank but its dp rank."""
