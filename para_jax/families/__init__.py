"""The families of Hugging Face checkpoints: plain data, and what their config.json means here."""
