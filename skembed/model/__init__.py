"""The model itself: configuration, network, attention, pooling, tokens, files."""
