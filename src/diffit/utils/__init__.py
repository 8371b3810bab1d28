"""What knows nothing of diffusion: files, randomness, processes, precision, pictures, the Hub."""
