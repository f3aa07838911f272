"""Fine-tuning many tenants in one step: loss, optimizer, loop and exact checkpoints."""
