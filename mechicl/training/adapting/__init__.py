"""Fine-tuning a vision-language model on episodes."""
