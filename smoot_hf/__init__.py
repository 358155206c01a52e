"""SMOOT for Hugging Face: a Trainer that makes saliency maps sharp and faithful."""
