"""A causal language model of KanervaMixer layers for transformers: it registers, saves, loads and generates."""
