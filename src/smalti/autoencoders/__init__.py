"""Pixels to latents and back: diffusers' autoencoders by name or folder, and a small one of our own."""
