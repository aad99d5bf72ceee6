"""How a prior's loss falls with the compute of its training: ``dmm scaling``."""
