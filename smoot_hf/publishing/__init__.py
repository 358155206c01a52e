"""What is published beside a trained model: its card and the figures of the card."""
