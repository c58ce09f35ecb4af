"""Pixels to latents or tokens and back: diffusers' autoencoders by name or folder, and small ones of our own."""
