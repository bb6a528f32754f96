"""The branch, and the model that joins it to a frozen tower: embeddings, losses, video tokens, and files of weights."""
