"""Input pipelines: the specification of the batches and the loaders that make them."""
