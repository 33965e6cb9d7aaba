"""Byte mutators over everything of ours that parses what strangers send, with the seeds of what once failed."""
