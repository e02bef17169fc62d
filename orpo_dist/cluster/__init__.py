"""Starting runs: on this machine and others (launch), and through SLURM (submit, status, cancel)."""
