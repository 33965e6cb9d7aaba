"""A virtual machine monitor on /dev/kvm. docs/vmm.md has its memory map, devices, boot sequence and threat model."""
