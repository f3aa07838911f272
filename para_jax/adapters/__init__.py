"""Adapters: one file per method, and the bank that stacks every tenant's."""
