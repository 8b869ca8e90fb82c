"""The means of token embeddings: of a table's rows by group, and of embeddings that are there already."""
