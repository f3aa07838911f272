"""The frozen language model: one decoder for all families."""
