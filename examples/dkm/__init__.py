"""The generative model trained, studied and shown."""
