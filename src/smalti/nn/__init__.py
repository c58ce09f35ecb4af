"""Parts that several networks share: attention, embeddings, feed-forward layers."""
