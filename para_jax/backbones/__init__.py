"""The frozen language model: one decoder module, driven by its config."""
