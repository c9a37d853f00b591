"""Devices beside the CPU, here and on RPC servers, and the layers that go to them."""
