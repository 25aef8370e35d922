"""Tokens, model, loop, checkpoint: how one cell is computed. Torch and transformers are imported late."""
