"""Fine-tuning: from a decoder that is served and examples of what it should answer, to one that answers so."""
