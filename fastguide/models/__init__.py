"""Transformers models as fastguide runs them: attention, passes, loading, value models."""
