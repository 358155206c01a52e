"""What a command does: train, evaluate, compare over methods and seeds, show."""
