"""Decoding: prompts in, completions out, with the whole token loop on the device."""
