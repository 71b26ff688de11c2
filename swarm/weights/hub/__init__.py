"""Files of Hugging Face Hub repositories, whole or in part."""
