"""From a kernel's file to a vCPU at its first instruction. Pure functions on bytes and the guest's memory, but for reading.

`load.load` does it all; each other module knows one format.
"""
