"""Fine-tuning a given vision-language model on episodes, with adapters or whole; `training.vlm` grows one from nothing."""
