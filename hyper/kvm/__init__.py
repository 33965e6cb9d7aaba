"""The kernel's /dev/kvm by raw ioctls. Today: the probe that tells a KVM that runs code from one that emulates it."""
