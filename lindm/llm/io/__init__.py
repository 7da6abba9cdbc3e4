"""Model files: Hugging Face directories, safetensors, GGUF and PEFT adapters."""
