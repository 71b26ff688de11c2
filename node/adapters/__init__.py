"""LoRA adapters as PEFT saves them: read and checked before anything is loaded."""
