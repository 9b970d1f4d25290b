"""The way of the data: text, documents, token ids, a file of them, windows."""
