"""What a training run consists of beside its networks and its data."""
