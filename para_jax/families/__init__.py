"""The families of Hugging Face checkpoints as plain data, and the conversion of their config.json."""
