"""Names of the files in a cell's folder."""

VIDEO, LATENTS, CHUNKS, SIGHT, FRAMES = "take.mp4", "latents.safetensors", "chunks.json", "sight.json", "frames.json"
