"""From text to batches: corpora -> shards -> order."""
