"""Reading and fine-tuning on one GPU beside plain transformers and peft: random weights, no hub."""
