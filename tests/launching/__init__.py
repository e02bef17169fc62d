"""Starts small runs under torchrun and accelerate launch, for the tests of every folder."""
