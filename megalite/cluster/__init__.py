"""Runs on a SLURM cluster: submit, attend, sweep, and what became of them. The scripts that run there are in slurm/."""
