"""Which modules matter: scores of an adapter's modules on held-out data, and the choice of a FanLoRA setting."""
