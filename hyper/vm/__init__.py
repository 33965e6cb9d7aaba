"""What every back-end of virtual machines shares: see hyper/README.md."""
