"""What the package costs, measured: each file is one command, and prints ratios within one run."""
