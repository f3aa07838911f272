"""A mounted drive for tests: `Drive` mounts it, `cloud` is what it does, `fuse` speaks with the kernel."""
