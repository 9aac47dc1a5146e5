"""From a corpus to training batches: documents, token shards, windows, batches."""
