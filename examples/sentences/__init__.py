"""A memory of sentences, read by paraphrase: ``python -m examples.sentences``."""
