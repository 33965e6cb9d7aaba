"""The devices of the monitor: virtio 1.2 over memory-mapped registers."""
