"""Registries over HTTP: the distribution specification 1.1 and Docker's older dialect of it.

Way in: `client.Repository`. urllib3 is imported with `transport`, which nothing loads before the first pull or push.
"""
