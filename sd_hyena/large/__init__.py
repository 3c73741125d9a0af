"""Large images: tiles, regions, tiled attention and VAE, noise inversion. Knows nothing of students."""
