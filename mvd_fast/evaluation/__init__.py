"""What a pre-trained network is worth: features and probes."""
