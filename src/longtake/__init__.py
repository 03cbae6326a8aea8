"""longtake: autoregressive video generation of any length in bounded memory."""
