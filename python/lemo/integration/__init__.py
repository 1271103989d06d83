"""How the engine gets into transformers models, PEFT adapters, and the trainers that drive them."""
