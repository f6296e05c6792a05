"""Raw files -> data sets: samples in an order of their own, in shards with index and card, whole or not at all."""
