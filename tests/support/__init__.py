"""What is no test itself: small runs, configs, stand-ins, a Slurm, a browser, and scripts that tests start."""
