"""Model families, weights and tokenizers."""
