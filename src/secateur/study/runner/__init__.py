"""Where and when stages run: the scheduler, local workers, torchrun, SLURM, and leases on unfinished stages."""
