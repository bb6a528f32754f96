"""Conversion of published chat checkpoints to folders that transformers loads."""
