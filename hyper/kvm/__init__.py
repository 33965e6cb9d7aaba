"""The kernel's /dev/kvm: the API as a table (api.py) and objects that own its descriptors. docs/kvm.md shows it in use."""
