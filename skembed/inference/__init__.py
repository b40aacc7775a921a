"""From parameters and texts to vectors: settings, encoder, engine, loaded models."""
